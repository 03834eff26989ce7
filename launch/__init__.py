"""Thin mains: flags, gin files, one library call each."""
