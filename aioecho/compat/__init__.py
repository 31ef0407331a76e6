"""Other libraries' names over aioecho's servers, to move a program over by its imports."""

__all__: list[str] = []
