"""Runs a worker's script as ``__main__``. Run by path before the script, so it imports only what is loaded anyway.

``interpreter.py FILE [-m] SCRIPT args…`` also appends to FILE the names of the modules that the script asks for: what
the standby imports beforehand (`holdfast.launcher.spawner`).
"""

from __future__ import annotations

import os
import sys

_MAX_NAMES = 20_000
_HERE = __file__


class Recorder:
    """A finder that finds nothing and writes down what was looked for. Any thread; this process only."""

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._pid = os.getpid()
        self._left = _MAX_NAMES

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Called by the import system for each module that is not loaded yet."""
        if self._left > 0 and os.getpid() == self._pid:
            self._left -= 1
            try:
                os.write(self._descriptor, name.encode(errors="replace") + b"\n")
            except OSError:  # the disk is full, or the script has closed what it did not open: a slower restart
                self._left = 0


def run_as_main(arguments: list[str]) -> None:
    """Run ``[-m] SCRIPT args…`` as the interpreter would; what it raises reaches the interpreter as from the script.

    Call it from the outermost frame; `sys.path` must not hold a directory for the script yet.
    """
    module = type(sys)("__main__")
    names = {"__builtins__": sys.modules["builtins"]}
    module.__dict__.update(names if sys.version_info >= (3, 14) else {**names, "__annotations__": {}})
    before = sys.modules["__main__"]
    for name in [name for name, found in sys.modules.items() if found is before]:
        sys.modules[name] = module  # multiprocessing keeps it under a second name
    sys.orig_argv = [sys.orig_argv[0], "-u", *arguments]
    try:
        if arguments[0] == "-m":
            _run_module(arguments[1:])
        else:
            _run_script(module, arguments)
    except SystemExit:
        raise
    except BaseException as error:
        _show(error)
        raise


def _run_module(arguments: list[str]) -> None:
    sys.argv = ["-m", *arguments[1:]]
    _put_first(os.getcwd())
    import runpy

    runpy._run_module_as_main(arguments[0])  # type: ignore[attr-defined]  # what ``python -m`` itself calls


def _run_script(module: object, arguments: list[str]) -> None:
    script = arguments[0]
    sys.argv = list(arguments)
    _put_first(os.path.dirname(os.path.realpath(script)))
    path = script if os.path.isabs(script) else os.path.join(os.getcwd(), script)
    loader = sys.modules["_frozen_importlib_external"].SourceFileLoader("__main__", path)
    names = {"__file__": path, "__cached__": None, "__loader__": loader, "__package__": None, "__spec__": None}
    module.__dict__.update(names)
    with open(path, "rb") as file:
        source = file.read()
    exec(compile(source, path, "exec", dont_inherit=True), module.__dict__)


def _put_first(directory: str) -> None:
    if not getattr(sys.flags, "safe_path", False):
        sys.path.insert(0, directory)


def _show(error: BaseException) -> None:
    """What the interpreter does with an exception that nobody caught, without the frames of this file."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == _HERE:
        trace = trace.tb_next
    error.__traceback__ = trace
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error, trace
    sys.excepthook(type(error), error, trace)
    sys.excepthook = lambda kind, error, trace: None  # the interpreter still decides on the exit code


if __name__ == "__main__":
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]  # this file's own directory, whose modules must not stand in for anybody's
    sys.meta_path.insert(0, Recorder(sys.argv[1]))
    run_as_main(sys.argv[2:])
