"""Documents as files, and how each kind of file is read."""
