"""From a user's files and datasets to checked rows."""
