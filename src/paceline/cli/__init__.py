"""The command line: a thin shell over engine and study."""
