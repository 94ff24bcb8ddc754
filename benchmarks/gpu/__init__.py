"""Check and measure everything on a GPU with one command."""
