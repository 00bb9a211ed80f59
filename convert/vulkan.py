"""A Vulkan driver that runs on the CPU, for LiteRT's GPU accelerator on a machine without a GPU.

    python -m convert.vulkan        (or: make gpu-driver)

Unpacks Mesa's lavapipe (25 or newer; older ones lack what the accelerator needs) and Vulkan's
loader from Debian's packages into build/vulkan. Nothing is installed and no rights are needed, only
`apt-get` and `dpkg-deb`. A driver that is set in the environment (VK_ICD_FILENAMES or
VK_DRIVER_FILES) comes first; that of a GPU must be set there, too.
"""

import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "build" / "vulkan"
PACKAGES = ("mesa-vulkan-drivers", "libvulkan1")
MIRROR = "http://deb.debian.org/debian"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
# Every Debian has these; a second copy within one process would not be the same library.
BASE = ("libc6", "libgcc-s1", "libstdc++6", "gcc-12-base", "gcc-14-base", "zlib1g")
SET = ("VK_ICD_FILENAMES", "VK_DRIVER_FILES")


class NoDriverError(RuntimeError):
    """No driver can be had here: one line that says why."""


def gpu_available() -> str:
    """Empty where there is a Vulkan driver for the accelerator; otherwise the reason in a line."""
    if any(name in os.environ for name in SET) or (FOLDER / "lvp_icd.json").is_file():
        return ""
    return "no Vulkan driver: run `make gpu-driver`, or name one in VK_DRIVER_FILES"


def use() -> None:
    """Makes the driver that `fetch` unpacked, if there is one, this process's Vulkan driver.

    To be called before the accelerator looks for one. The libraries are loaded here, because the
    search path of a running process cannot be changed; whoever asks for one by its soname gets it.
    """
    icd = FOLDER / "lvp_icd.json"
    if any(name in os.environ for name in SET) or not icd.is_file():
        return
    os.environ["VK_ICD_FILENAMES"] = str(icd)
    os.environ.setdefault("XDG_RUNTIME_DIR", tempfile.gettempdir())
    os.environ.setdefault("MESA_SHADER_CACHE_DIR", str(FOLDER / "shaders"))
    waiting = [file for file in sorted((FOLDER / "lib").iterdir()) if ".so" in file.name]
    while waiting:  # a library after those that it needs
        left = [file for file in waiting if not _loaded(file)]
        if len(left) == len(waiting):
            return  # LiteRT will say that it finds no driver
        waiting = left


def _loaded(file: Path) -> bool:
    try:
        ctypes.CDLL(str(file))
    except OSError:
        return False
    return True


def fetch() -> None:
    """Unpacks the driver into FOLDER, whole or not at all.

    Raises:
      NoDriverError: no Debian, or a package cannot be fetched.
    """
    if missing := [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]:
        raise NoDriverError(f"{missing[0]} is missing; install Mesa's Vulkan drivers, 25 or newer")
    release = _codename()
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER.parent, prefix=".vulkan-") as scratch:
        new = _unpacked(Path(scratch), release)
        shutil.rmtree(FOLDER, ignore_errors=True)
        new.rename(FOLDER)


def _codename() -> str:
    lines = Path("/etc/os-release").read_text().splitlines()
    release = dict(line.split("=", 1) for line in lines if "=" in line)
    if release.get("ID") != "debian":
        raise NoDriverError("this is no Debian; install Mesa's Vulkan drivers, 25 or newer")
    return release.get("VERSION_CODENAME", "").strip('"')


def _unpacked(scratch: Path, release: str) -> Path:
    suites = [release, f"{release}-backports"] if release == "bookworm" else [release]
    sources = scratch / "sources.list"
    sources.write_text(
        "".join(f"deb [signed-by={KEYRING}] {MIRROR} {suite} main\n" for suite in suites)
    )
    for name in ("lists/partial", "cache/archives/partial", "debs", "root"):
        (scratch / name).mkdir(parents=True)
    options = {
        "Dir::State::lists": scratch / "lists",
        "Dir::State::status": "/dev/null",  # as if nothing were installed: all dependencies
        "Dir::Cache": scratch / "cache",
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "/dev/null",
        "APT::Sandbox::User": "root",
        "APT::Install-Recommends": "false",
    }
    apt = ["apt-get", "-qq", *(f"-o{key}={value}" for key, value in options.items())]
    _run([*apt, "update"], scratch)
    plan = _run([*apt, "-s", "install", "-t", suites[-1], *PACKAGES], scratch)
    names = [line.split()[1] for line in plan.splitlines() if line.startswith("Inst ")]
    _run(
        [*apt, "download", "-t", suites[-1], *(n for n in names if n not in BASE)], scratch / "debs"
    )
    for package in sorted((scratch / "debs").glob("*.deb")):
        _run(["dpkg-deb", "-x", str(package), str(scratch / "root")], scratch)
    return _arranged(scratch)


def _arranged(scratch: Path) -> Path:
    """The libraries in one folder, and the driver's description with its path relative to that, so
    that the whole may be moved."""
    new = scratch / "new"
    (new / "lib").mkdir(parents=True)
    for file in (scratch / "root").rglob("*.so*"):
        other_driver = "libvulkan_" in file.name and file.name != "libvulkan_lvp.so"
        if (
            file.is_file()
            and not file.is_symlink()
            and not other_driver
            and "Layer" not in file.name
        ):
            shutil.move(file, new / "lib")  # what it is called does not matter: see `use`
    icd = next((scratch / "root").rglob("lvp_icd*.json"))
    settings = json.loads(icd.read_text())
    settings["ICD"]["library_path"] = "./lib/libvulkan_lvp.so"
    (new / "lvp_icd.json").write_text(json.dumps(settings, indent=2) + "\n")
    return new


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["no reason given"]
        raise NoDriverError(f"{' '.join(command[:1])} failed: {lines[-1]}")
    return done.stdout


def main() -> None:
    if (FOLDER / "lvp_icd.json").is_file() or any(name in os.environ for name in SET):
        return
    try:
        fetch()
    except NoDriverError as error:
        print(f"no software GPU, tests that need one will not run: {error}", file=sys.stderr)
        sys.exit(1)
    print(f"{FOLDER}: Mesa's software Vulkan driver")


if __name__ == "__main__":
    main()
