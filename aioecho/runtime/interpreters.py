"""What the interpreter that runs this can do: a subinterpreter gets no signals, and has fewer threads and extension modules."""

__all__ = ["is_subinterpreter"]


def is_subinterpreter() -> bool:
    """Tell whether this runs in another interpreter than the one that the process began with."""
    # `concurrent.interpreters` has it from 3.14 on, and imports much more.
    try:
        import _interpreters as interpreters  # type: ignore[import-not-found, unused-ignore]  # 3.13
    except ImportError:
        try:
            import _xxsubinterpreters as interpreters  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError:  # not CPython
            return False
    return bool(interpreters.get_current() != interpreters.get_main())
