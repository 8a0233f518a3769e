"""`ditmoe serve`: images of many users over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from ditmoe.model.errors import UserError


def command(
    runs: Annotated[Path, typer.Argument(help="A folder of runs, or a run.", metavar="RUNS")],
    *,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any other than loopback needs a token.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one, which is printed.")
    ] = 8000,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File (mode 600) with the token of all clients, or lines of a user and a token. "
            "[default: $DITMOE_SERVICE_TOKEN]",
        ),
    ] = None,
    state: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for jobs. [default: RUNS/.service]")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:N. [default: cuda if there is one]")
    ] = None,
    memory: Annotated[float, typer.Option(min=0.001, help="Memory for the weights of all networks, GiB.")] = 8.0,
    batch: Annotated[
        int,
        typer.Option(min=1, max=512, help="Rows in a pass through the network, and images being drawn at once."),
    ] = 16,
    queue: Annotated[
        int, typer.Option(min=1, help="Images of one user that may wait in the queue, at most.")
    ] = 256,
    most_images: Annotated[int, typer.Option(min=1, max=10_000, help="Images in one request, at most.")] = 64,
    most_passes: Annotated[
        int,
        typer.Option(
            min=1, help="Passes through the network that all images of a request may take together, at most."
        ),
    ] = 100_000,
    inception: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="File of Inception-v3, for evaluations; see docs/evaluate.md."),
    ] = None,
    dinov2: Annotated[
        Path | None, typer.Option(metavar="FILE", help="File of DINOv2, for evaluations; see docs/evaluate.md.")
    ] = None,
    reference: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=FILE|SHARDS",
            help="Add a reference that evaluations may name, besides the files in RUNS/references; may be "
            "repeated.",
        ),
    ] = [],  # noqa: B006  # typer's way
    processes: Annotated[
        int, typer.Option(min=0, help="Processes on this machine that share an evaluation; may be 0 with --crew.")
    ] = 1,
    crew: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder through which workers on any machine join evaluations: `ditmoe worker FOLDER`.",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        typer.Option(
            "--listen", metavar="ADDRESS|INTERFACE", help="Address of the crew, as for `ditmoe evaluate`."
        ),
    ] = None,
    load: Annotated[
        list[str],
        typer.Option(
            metavar="RUN",
            help="Load this run's network, and each newer one, before anybody asks; may be repeated.",
        ),
    ] = [],  # noqa: B006  # typer's way
    keep_jobs: Annotated[
        float | None,
        typer.Option(
            min=0.001, metavar="DAYS", help="Remove a job's results this long after its end. [default: keep them]"
        ),
    ] = None,
) -> None:
    """Draw images for many users at once, over HTTP. Other requests in the same batch never change an image's
    bits.

    Examples:
        ditmoe serve runs
        ditmoe serve runs --host 0.0.0.0 --port 8080 --token-file tokens --load photos
    """
    import torch

    from ditmoe.launcher.commands.sample import check_device
    from ditmoe.launcher.commands.serving.child import start_child
    from ditmoe.sampling.service.access import read_tokens
    from ditmoe.sampling.service.app import Service, ServiceSettings, make_app
    from ditmoe.sampling.service.jobs.evaluators import FOLDER, Evaluators, named_references
    from ditmoe.sampling.service.listening import is_loopback, serve
    from ditmoe.sampling.service.listening import listen as listen_on

    loopback = is_loopback(host)
    tokens = read_tokens(token_file)
    if tokens is None and not loopback:
        raise UserError(
            f"--host {host}: is not loopback, so whoever reaches it may use it; expected a token in "
            "--token-file or DITMOE_SERVICE_TOKEN"
        )
    if crew is None and processes == 0:
        raise UserError("--processes 0: expected 1 or more, or --crew FOLDER for workers that join")
    if listen is not None and crew is None:
        raise UserError(f"--listen {listen}: workers of other machines join by --crew FOLDER; expected both")
    name = check_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    settings = ServiceSettings(
        runs=runs,
        device=torch.device(name),
        memory=int(memory * 2**30),
        state=state or runs / ".service",
        start_child=start_child,
        batch=batch,
        queue=queue,
        most_images=most_images,
        most_passes=most_passes,
        tokens=tokens,
        loopback=loopback,
        evaluators=Evaluators(
            files={**({"inception": inception} if inception else {}), **({"dinov2": dinov2} if dinov2 else {})},
            references=named_references(reference),
            folder=runs / FOLDER,
            processes=processes,
            crew=crew,
            listen=listen,
        ),
        load=tuple(dict.fromkeys(load)),
        keep_seconds=None if keep_jobs is None else keep_jobs * 86_400,
    )
    with listen_on(host, port) as sockets:
        service = Service(settings)
        typer.echo(f"serving {runs} at {sockets.address}")
        serve(make_app(service), sockets)
