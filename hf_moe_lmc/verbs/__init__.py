"""The entry points of the package. Nothing but the command line and the example may import them."""
