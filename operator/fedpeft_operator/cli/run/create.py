"""`fedpeft run create`: checks a run file, builds adapter version 0 and uploads it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedpeft.api import views
from fedpeft.formatting import counted
from fedpeft.process import output
from fedpeft_operator.cli.epilogs import OF_SERVER, epilog
from fedpeft_operator.cli.exit_codes import Exit
from fedpeft_operator.cli.overrides import Seed, Settings, override_of
from fedpeft_operator.cli.session import Session, require, run_async, session_of
from fedpeft_operator.cli.weights import Weights, check_needed

if TYPE_CHECKING:
    from fedpeft.config import RunConfig
    from fedpeft.v1 import run_pb2

EPILOG = epilog(
    "fedpeft run create emoji.toml --check",
    "fedpeft --server 127.0.0.1:7070 run create emoji.toml",
    "fedpeft run create emoji.toml --set training.learning_rate=0.005 --seed 1",
    ends=OF_SERVER,
)


def create(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The run file (TOML).")],
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Only validate: every field, that they go together, the weights; nothing is sent."
        ),
    ] = False,
    weights: Weights = None,
    settings: Settings = [],  # noqa: B006
    seed: Seed = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Create a run from a run file: builds the model and uploads adapter version 0."""
    from fedpeft.config import faults_in, load_run_file

    override = override_of(settings, seed)
    config = load_run_file(file, override)
    check_needed(config.model, weights)
    with faults_in(file, override):
        if check:
            _check(file, config, weights, as_json)
            return
        try:
            run = run_async(created(session_of(context), config, weights))
        except KeyboardInterrupt:
            output.note("fedpeft: interrupted; `fedpeft run list` says whether the run was created")
            raise typer.Exit(Exit.INTERRUPTED) from None
    if as_json:
        output.say_json(views.run_row(run) | {"backbone_fingerprint": run.backbone_fingerprint})
    else:
        output.say(f"{run.id} is created: {views.adapter_parameters(run.spec):,} parameters in version 0")
        output.say(f"watch it with: fedpeft run watch {run.id}")


async def created(session: Session, config: RunConfig, weights: Path | None) -> run_pb2.Run:
    """Builds version 0 of a run and uploads it; returns the run.

    Raises:
        ServerUnreachable: Before anything is built, if the server is not there.
        ModelInvalid: If the model or its weights cannot be had.
        ConfigInvalid: As `first_version`, before anything is built.
    """
    require("train", "torch", "timm")
    async with session.client() as server:
        await server.check()  # building takes long; a wrong address is found now
        output.note("building the model ...")
        from fedpeft.api.initial_version import first_version

        first = first_version(config, weights)
        with output.progress("uploading version 0") as progress:
            return await server.create_run(
                config, first.spec, first.fingerprint, first.tensors, first.model_parameters, progress=progress
            )


def _check(file: Path, config: RunConfig, weights: Path | None, as_json: bool) -> None:
    """Says what a valid file means; the method is tried on a model without values, a weights file fitted to it.

    Raises:
        ConfigInvalid: If the parts of the run do not work with each other, a server cannot hold it, or there is no
            such engine for its simulation.
        ModelInvalid: If the model or its weights cannot be had.
    """
    require("train", "torch", "timm")
    from fedpeft.api.initial_version import checked_spec
    from fedpeft.models.backbones import check_weights

    spec = checked_spec(config).adapter
    path = check_weights(config.model, weights)
    fits = {"hub": "the hub's, not checked", "none": "random"}
    about = f"{path}, which fits" if path else fits[config.model.weights]
    if as_json:
        output.say_json(
            {
                "valid": True,
                "name": config.name,
                "method": spec.method,
                "adapter_parameters": spec.parameters,
                "weights": str(path) if path else config.model.weights,
                "config": config.model_dump(mode="json", exclude_none=True),
            }
        )
        return
    output.say(
        f"{file} is valid: {spec.method} on {config.model.name}, {spec.parameters:,} parameters, "
        f"{counted(config.rounds.count, 'round')} of {counted(config.rounds.clients, 'client')}; "
        f"weights: {about}"
    )
