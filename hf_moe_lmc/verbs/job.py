"""The one way to run a writing verb: open and check everything, then either return the plan or do the work.

A verb is a function that turns its arguments into a Request. `@verb` makes the public function of it, which runs the request;
its attribute `plan`, with the same arguments, stops after the checks. So a dry run finds whatever the run would find first.
"""

from __future__ import annotations

import inspect
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Generic, ParamSpec, Protocol, TypeVar, cast

from hf_moe_lmc.publishing.push import check_target, push_result
from hf_moe_lmc.runtime.processes import collective, process_group
from hf_moe_lmc.verbs.inputs import Inputs, Opener
from hf_moe_lmc.verbs.options import OutputOptions
from hf_moe_lmc.verbs.planning import Plan, Work, planned
from hf_moe_lmc.writing.output import enter_workspace
from hf_moe_lmc.writing.workspace import Workspace

P = ParamSpec("P")
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Job(ABC, Generic[R]):
    """What a verb is about to do. Everything has been checked from headers and small files; nothing has been written."""

    @property
    @abstractmethod
    def work(self) -> Work:
        """What will be read and written, for the plan."""

    @abstractmethod
    def run(self, workspace: Workspace | None) -> R:
        """Does it. The workspace is that of process 0; others have None."""


@dataclass(frozen=True, kw_only=True)
class Request(Generic[R]):
    """One call of a verb.

    Attributes:
        output: a new or empty folder.
        inputs: models as the user named them.
        prepare: opens and checks the inputs; what it raises is whatever is wrong, in one list.
        writes_weights: the output is a checkpoint; it is published only where no other weights are.
        dtype: that quantized weights are read in.
    """

    verb: str
    output: str | os.PathLike[str]
    inputs: tuple[str | os.PathLike[str], ...]
    options: OutputOptions
    prepare: Callable[[Inputs], Job[R]]
    writes_weights: bool = True
    dtype: str = "float32"

    def run(self) -> R:
        """Checks, fetches, computes, writes, publishes."""
        with ExitStack() as stack:
            job = self._checked(stack)
            workspace = enter_workspace(
                self.output, *self.inputs, stack=stack, resume=self.options.resume, overwrite=self.options.overwrite
            )
            result = job.run(workspace)
        if self.options.push_to_hub and process_group().is_main:
            push_result(self.output, self.options.push_to_hub, private=self.options.private)
        return result

    def plan(self) -> Plan:
        """Checks, and says what `run` would do."""
        with ExitStack() as stack:
            return planned(self.verb, Path(self.output), self._checked(stack).work)

    def plan_beside(self, opener: Opener) -> Plan:
        """The same with models that have been opened already, whatever stands where the output would be."""
        with ExitStack() as stack:
            inputs = Inputs(stack, dtype=self.dtype, opener=opener)
            return planned(self.verb, Path(self.output), self.prepare(inputs).work)

    def _checked(self, stack: ExitStack) -> Job[R]:
        inputs = Inputs(stack, self.output, overwrite=self.options.overwrite, dtype=self.dtype)
        repo_id = self.options.push_to_hub
        if repo_id and process_group().is_main:
            license = self.options.license
            inputs.check_first(lambda: check_target(repo_id, self.output, weights=self.writes_weights, license=license))
        return self.prepare(inputs)


class Verb(Protocol[P, R_co]):
    """A public function that runs a request, or plans it; `request` makes the request, and does nothing else."""

    plan: Callable[P, Plan]
    request: Callable[P, Request[Any]]

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def verb(request: Callable[P, Request[R]]) -> Verb[P, R]:
    """The public function of a verb, from the function that makes its request."""

    @wraps(request)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        return request(*args, **kwargs).run()

    def plan(*args: P.args, **kwargs: P.kwargs) -> Plan:
        return request(*args, **kwargs).plan()

    found = inspect.signature(request)
    result = str(found.return_annotation).removeprefix("Request[").removesuffix("]")
    public = cast("Any", collective(run))
    public.plan = collective(plan)
    public.request = request
    for function, annotation in ((public, result), (public.plan, "Plan")):
        function.__signature__ = found.replace(return_annotation=annotation)
    public.plan.__name__ = f"plan_{request.__name__}"
    public.plan.__doc__ = f"The Plan of what `{request.__name__}` would do with these arguments; raises what it would raise."
    return cast("Verb[P, R]", public)
