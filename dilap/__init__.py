"""DiLAP prunes a network to a latency budget on the device that will run it, and measures whether the budget is kept.

    import dilap

    result = dilap.prune("smollm2-135m", target="host_cpu", budget="70%", out="runs/mine")

The names in `__all__` are imported when they are first used, because importing torch takes seconds. `dilap.export` and
`dilap.report` are packages that can also be called, and then do what the commands `dilap-export` and `dilap-report` do.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

__version__ = "0.1.0"
# The module of each public name.
_PLACES = {
    "compare": "dilap.job.api",
    "evaluate": "dilap.job.api",
    "export": "dilap.job.api",
    "load": "dilap.job.api",
    "profile": "dilap.job.api",
    "prune": "dilap.job.api",
    "report": "dilap.report.report",
    "Budget": "dilap.core.workload",
    "DilapError": "dilap.core.errors",
    "Workload": "dilap.core.workload",
}
_PACKAGES = ("export", "report")  # public functions whose names are also those of packages
__all__ = ["__version__", *_PLACES]  # noqa: PLE0604 - names of functions and classes


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'dilap' has no attribute {name!r}")
    if name in _PACKAGES:
        return importlib.import_module(f"dilap.{name}")
    return getattr(importlib.import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _CallablePackage(ModuleType):
    """A package that can be called: the call goes to the public function of the same name, `dilap.report` for one."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        name = self.__name__.rpartition(".")[2]
        return getattr(importlib.import_module(_PLACES[name]), name)(*arguments, **options)


class _Face(ModuleType):
    """The class of this module, which makes the packages in `_PACKAGES` callable.

    The import system sets a package as an attribute of this module when the package is first imported.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PACKAGES:
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
