"""(targets, predictions) -> {name: float}: what an answer is worth. numpy and scipy only."""
