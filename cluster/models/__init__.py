"""Models on disk: the default ones, how they are built, and where every model is found."""
