"""Commands on the launch policy: which software may run vTPMs on this host, and what was launched in this boot."""

from __future__ import annotations

import click

from vtpm.cli.output import Output, print_fields, print_json, print_line, print_message, print_table
from vtpm.cli.session import Session, confirm, json_option, pass_session, yes_option
from vtpm.wire.api_images import Image, ImageKind

_kind_option = click.option(
    "--kind", type=click.Choice([kind.value for kind in ImageKind]), help="Of domain, for an image not installed now."
)


@click.command("images")
@json_option
@pass_session
def list_images(session: Session) -> None:
    """List the images that may run vTPMs, those that may no more, and which vTPMs run them."""
    with session.connect() as manager:
        images = manager.images()
    if session.output is Output.JSON:
        print_json(images)
        return
    print_table(
        ("KIND", "MEASUREMENT", "LABEL", "LIBTPMS", "STATE", "RUNS"),
        [
            (
                image.kind,
                image.measurement,
                image.label or "-",
                image.engine_version or "-",
                image.state,
                ", ".join(image.vtpms) or "-",
            )
            for image in images
        ],
    )


@click.command("allow-image")
@click.argument("measurement")
@click.option("--label", required=True, help="A name for it.")
@_kind_option
@json_option
@pass_session
def allow_image(session: Session, measurement: str, label: str, kind: str | None) -> None:
    """Let the image with this MEASUREMENT run vTPMs: a new one before it is used, or one that was retired."""
    with session.connect() as manager:
        allowed = manager.allow_image(measurement, label, kind)
    for warning in allowed.warnings:
        print_message(f"warning: {warning}")
    if session.output is Output.JSON:
        print_json(allowed)
    else:
        _print_image(allowed.image)


@click.command("retire-image")
@click.argument("measurement")
@yes_option
@json_option
@pass_session
def retire_image(session: Session, measurement: str, yes: bool) -> None:
    """Let the image with this MEASUREMENT run no vTPM any more; refused while it runs one."""
    if not yes:
        confirm("No vTPM will be started with this image any more. Retire it?", refusal="the image stays allowed")
    with session.connect() as manager:
        image = manager.retire_image(measurement)
    if session.output is Output.JSON:
        print_json(image)
    else:
        _print_image(image)


@click.command()
@json_option
@pass_session
def launches(session: Session) -> None:
    """List what was launched in this boot, and say whether the platform TPM's PCR says so too."""
    with session.connect() as manager:
        found = manager.launches()
    if session.output is Output.JSON:
        print_json(found)
        return
    print_fields(
        [
            ("PCR", f"{found.bank}:{found.pcr}"),
            ("holds", found.value),
            ("began at", found.start or "-"),
            ("log", found.log),
            ("log replays to it", "yes" if found.replays else "no"),
        ]
    )
    print_line("")
    print_table(
        ("KIND", "MEASUREMENT", "LABEL"),
        [
            (entry.kind, entry.measurement, entry.label or "-")
            if not entry.held
            else ("-", entry.held, "the PCR held this: something else extended it")
            for entry in found.entries
        ],
    )
    if found.doubt:
        print_message(f"warning: {found.doubt}")


def _print_image(image: Image) -> None:
    print_line(f"{image.kind} image {image.measurement} ({image.label}) is {image.state}")
