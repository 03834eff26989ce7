"""Scores of answers: (targets, predictions) -> {name: float}. numpy and scipy only."""
