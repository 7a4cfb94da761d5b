"""Builds the images, pushes them, lists what they hold: `make images`, `make push`, `make sbom`."""

import argparse
import json
import shutil
import subprocess
import tempfile
import venv
from pathlib import Path

import trackrec
from components.images import IMAGE_OF, LOCKS_OF, ROOT, tagged

# What stands for the base's digest until somebody fills it in (docs/cluster.md).
UNPINNED = "sha256:" + "0" * 64
SBOM_TOOL = "cyclonedx-bom==7.5.0"


def build(images: list[str], registry: str, base: str, source: str, options: list[str]) -> None:
    """Builds each image and gives it the tags of all its stages.

    Args:
        base: replaces the Dockerfiles' own base image; empty leaves it.
        source: address of the repository, for the label; empty leaves it unknown.
        options: further options of `podman build`.
    """
    _need("podman")
    revision = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    given = {"REVISION": revision.stdout.strip(), "SOURCE": source, "BASE_IMAGE": base}
    # What is not known keeps the Dockerfile's own value.
    arguments = {"VERSION": trackrec.__version__} | {name: value for name, value in given.items() if value}
    for image in images:
        dockerfile = ROOT / "images" / image / "Dockerfile"
        if not base and UNPINNED in dockerfile.read_text(encoding="utf-8"):
            raise SystemExit(
                f"error: {dockerfile.relative_to(ROOT)} has no digest for its base image; fill it in as "
                "docs/cluster.md says, or give another base: make images BASE_IMAGE=..."
            )
        command = ["podman", "build", "--file", str(dockerfile), *options]
        command += [f"--build-arg={name}={value}" for name, value in arguments.items()]
        command += [f"--tag={tag}" for tag in _tags(image, registry)]
        _run([*command, str(ROOT)])


def push(images: list[str], registry: str) -> None:
    """Pushes each image under the tags of all its stages."""
    _need("podman")
    tags = [tag for image in images for tag in _tags(image, registry)]
    for tag in tags:
        if subprocess.run(["podman", "image", "exists", tag], check=False).returncode:
            raise SystemExit(f"error: {tag} is not built; run: make images REGISTRY={registry}")
    for tag in tags:
        _run(["podman", "push", tag])


def sbom(images: list[str], folder: Path) -> None:
    """Writes `folder/IMAGE.cdx.json`, CycloneDX of all Python packages that the image's locks name."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        _run([f"{scratch}/bin/python", "-m", "pip", "install", "--quiet", SBOM_TOOL])
        for image in images:
            locks = [ROOT / "requirements" / f"{lock}.txt" for lock in LOCKS_OF[image]]
            done = subprocess.run(
                [f"{scratch}/bin/cyclonedx-py", "requirements", "--output-reproducible", "-"],
                input="".join(lock.read_text(encoding="utf-8") for lock in locks),
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                raise SystemExit(f"error: cyclonedx-py refuses the locks of {image}:\n{done.stderr}")
            found = json.loads(done.stdout)
            found["metadata"]["component"] = {
                "type": "container",
                "bom-ref": f"trackrec/{image}",
                "name": f"trackrec/{image}",
                "version": trackrec.__version__,
            }
            target = folder / f"{image}.cdx.json"
            target.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
            print(f"wrote {target}: {len(found['components'])} packages")


def _tags(image: str, registry: str) -> list[str]:
    return [tagged(stage, registry) for stage, own in IMAGE_OF.items() if own == image]


def _need(tool: str) -> None:
    if shutil.which(tool) is None:
        raise SystemExit(f"error: {tool} is not installed; on Debian: apt-get install {tool} buildah")


def _run(command: list[str]) -> None:
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"error: this failed: {' '.join(command)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("action", choices=["build", "push", "sbom"])
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"of {', '.join(LOCKS_OF)}; all by default")
    parser.add_argument("--registry", default="", help="where the images lie, as the config's `registry`")
    parser.add_argument("--base-image", default="", help="another base (Debian or Ubuntu, Python 3.11)")
    parser.add_argument("--source", default="", help="address of the repository, for the label")
    parser.add_argument("--option", action="append", default=[], help="an option of `podman build`; repeatable")
    parser.add_argument("--out", type=Path, default=Path("build/sbom"), help="where `sbom` writes")
    given = parser.parse_args()
    images = given.images or list(LOCKS_OF)
    if unknown := sorted(set(images) - set(LOCKS_OF)):
        parser.error(f"no image {', '.join(unknown)}; there are: {', '.join(LOCKS_OF)}")
    if given.action != "sbom" and not given.registry:
        parser.error("say where the images lie: REGISTRY=..., the same as the config's `registry`")
    if given.action == "build":
        build(images, given.registry, given.base_image, given.source, given.option)
    elif given.action == "push":
        push(images, given.registry)
    else:
        sbom(images, given.out)


if __name__ == "__main__":
    main()
