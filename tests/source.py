"""Source code as a tree, for tests that read it."""

import ast
import gc


def tree(source: str) -> ast.Module:
    """Returns the parsed source.

    The garbage collector waits: what it runs in the middle may change the depth of the stack, and Python 3.11
    then ends with "AST constructor recursion depth mismatch".
    """
    is_on = gc.isenabled()
    gc.disable()
    try:
        return ast.parse(source)
    finally:
        if is_on:
            gc.enable()
