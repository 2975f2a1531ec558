"""Scripts that another environment's Python may run: they import the standard library and one package."""
