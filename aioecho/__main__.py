"""``python -m aioecho``."""

from aioecho.cli import main

if __name__ == "__main__":
    main(prog_name="python -m aioecho")
