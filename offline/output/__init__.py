"""The compressed checkpoint, its report, its model card, and the messages of a run."""
