"""Command-line programs: each parses flags and gin files and makes one library call."""
