"""What runs inside of a sandbox, in the process of the untrusted program. Nothing here is protected from it.

So nothing here decides anything: a program that writes into its results can only say what it could have returned.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, NoReturn

from skyrl.sandbox.plain import from_text, to_text

RESULTS, IN, OUT = 3, 4, 5  # descriptors: what is told to the outside; lines that come in; lines that go out
NAME = "main.py"


def start(request: dict[str, Any], path: list[str]) -> NoReturn:
    """Becomes the program of a request and leaves the interpreter with it. Descriptors are in their places already."""
    gc.enable()
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    os.environ.clear()
    sys.argv[:] = [NAME, *request["arguments"]]
    sys.path[:] = [os.getcwd(), *path]
    for name in [name for name in sys.modules if name.partition(".")[0] == "skyrl"]:
        del sys.modules[name]
    sys.stdin = open(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)
    main = ModuleType("__main__")
    main.__dict__.update(__file__=NAME, __builtins__=builtins)
    sys.modules["__main__"] = main
    kinds = {"program": _program, "calls": _calls, "tests": _tests}
    os._exit(_ended(kinds[request["kind"]], request, main.__dict__))


def _ended(
    run: Callable[[dict[str, Any], dict[str, Any]], None], request: dict[str, Any], names: dict[str, Any]
) -> int:
    """Runs it and what it has left for the end, as an interpreter does, but for freeing everything; its exit code."""
    code = 0
    try:
        run(request, names)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code == 1 and error.code != 1:
            print(error.code, file=sys.stderr)
    except BaseException as error:
        code, trace = 1, error.__traceback__
        while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
    try:
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
        atexit._run_exitfuncs()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
    return code & 0xFF


def _program(request: dict[str, Any], names: dict[str, Any]) -> None:
    exec(compile(request["source"], NAME, "exec"), names)


def _calls(request: dict[str, Any], names: dict[str, Any]) -> None:
    """Defines a function and answers each line of IN, arguments, with one to OUT, what it returned or raised."""
    code = compile(request["source"], NAME, "exec")
    _tell(RESULTS, ["parses"])
    exec(code, names)
    function = names[request["entry_point"]]
    if not callable(function):
        raise TypeError(f"{request['entry_point']} is no function")
    _tell(RESULTS, ["defines"])
    for line in _lines(IN):
        try:
            positional, named = from_text(line)
            reply = ["returned", to_text(function(*positional, **named), request["keep_order"])]
        except Exception as error:
            reply = ["raised", type(error).__name__, str(error)[:200]]
        _tell(OUT, reply)


def _tests(request: dict[str, Any], names: dict[str, Any]) -> None:
    """Runs trusted tests; the function that they test runs in another sandbox, beyond OUT and IN."""
    import ast

    replies = _lines(IN)

    def candidate(*positional: Any, **named: Any) -> Any:
        try:
            os.write(OUT, (to_text([list(positional), named], True) + "\n").encode())
            kind, *rest = json.loads(next(replies))
            if kind == "returned":
                return from_text(*rest)
            name, message = rest
        except (OSError, StopIteration, ValueError, TypeError, RecursionError) as error:
            os.write(2, f"the function's sandbox has ended, or says what it cannot say ({error!r:.100})\n".encode())
            os._exit(1)  # no exception: a test might take it for the one that it expects
        found = vars(builtins).get(name)
        # An exception that ends a loop, or the tests without an error, would let them pass.
        if isinstance(found, type) and issubclass(found, Exception) and "Iteration" not in name:
            raise found(message)
        raise RuntimeError(f"{name}: {message}")

    def truth(value: Any) -> bool:
        assert type(value) is bool, f"a {type(value).__name__}, wanted True or False"
        return value

    def call(name: str, *arguments: ast.expr) -> ast.Call:
        return ast.Call(ast.Name(name, ast.Load()), list(arguments), [])

    class Strict(ast.NodeTransformer):
        """`a == b` and `a != b` also compare types; an assert that asks the function itself wants True or False."""

        def visit_Compare(self, node: ast.Compare) -> ast.AST:
            self.generic_visit(node)
            if len(node.ops) != 1 or not isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
                return node
            equal = call("__same__", node.left, *node.comparators)
            return equal if isinstance(node.ops[0], ast.Eq) else ast.UnaryOp(ast.Not(), equal)

        def visit_Assert(self, node: ast.Assert) -> ast.AST:
            self.generic_visit(node)
            negated = isinstance(node.test, ast.UnaryOp) and isinstance(node.test.op, ast.Not)
            asked = node.test.operand if negated else node.test  # type: ignore[attr-defined]
            if isinstance(asked, ast.Call) and getattr(asked.func, "id", "") in ("candidate", request["entry_point"]):
                asked = call("__truth__", asked)
                node.test = ast.UnaryOp(ast.Not(), asked) if negated else asked
            return node

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    exec(compile(request["context"], "context", "exec"), names)
    names.update({request["entry_point"]: candidate, "candidate": candidate, "__same__": same, "__truth__": truth})
    tree = ast.fix_missing_locations(Strict().visit(ast.parse(request["source"])))
    exec(compile(tree, "tests", "exec"), names)
    if callable(check := names.get("check")):
        check(candidate)
    _tell(RESULTS, ["passed"])


def same(left: object, right: object) -> bool:
    """Whether two values and all types inside of them are equal; of what is no plain data, what Python says."""
    try:
        return to_text(left) == to_text(right)
    except (TypeError, RecursionError):
        return bool(left == right)


def _tell(number: int, words: list[Any]) -> None:
    text = (json.dumps(words) + "\n").encode()
    while text:
        text = text[os.write(number, text) :]


def _lines(number: int) -> Iterator[str]:
    with open(number, encoding="utf-8", errors="replace", closefd=False) as stream:
        yield from stream
