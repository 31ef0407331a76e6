"""The option --factory of `serve`: what it goes together with."""

import click
from click.core import ParameterSource

from aioecho.cli.console import Mistake

__all__ = ["refuse_with_factory", "was_raised_by"]

# What is the program's, and not a server's.
OF_PROGRAM = {
    "handler", "factory", "workers", "reuse_port", "limit_max_requests", "limit_max_requests_jitter",
    "timeout_worker_healthcheck", "loop", "metrics", "control", "log_level", "log_format", "use_colors", "log_config",
    "log_queue", "pid_file", "user", "group", "reload", "app_dir", "config", "check_config",
}  # fmt: skip


def refuse_with_factory(context: click.Context) -> None:
    """Raise Mistake if an option was given, on the command line or in a file, that is the servers' own with a factory."""
    for parameter in context.command.params:
        name = parameter.name or ""
        source = context.get_parameter_source(name)
        if name not in OF_PROGRAM and source not in (None, ParameterSource.DEFAULT):
            raise Mistake(f"{parameter.opts[0]} and --factory do not go together: the factory gives it to its servers")


def was_raised_by(error: BaseException, function: object) -> bool:
    """Tell whether an error comes from within a function, by its traceback."""
    code, traceback = getattr(function, "__code__", None), error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code is code:
            return True
        traceback = traceback.tb_next
    return False
