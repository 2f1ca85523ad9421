"""Where torch.compile keeps its kernels, so that a process need not compile what an earlier one did.

<store>/compiled/toolchain    the precompiled header and which instruction sets the compiler can do; for all models
<store>/compiled/<key>        the kernels of one artifact, for this processor, these versions and so many threads

Torch runs what lies there and unpickles its index, so nobody else may have written it: the folder is made for its
owner alone, and one that others own or may write to is refused.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import stat
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from pipeline.artifact import Artifact, canonical_json
from pipeline.errors import HostError, PipelineError
from pipeline.hardware.host import describe_host
from pipeline.store.store import default_store_path
from pipeline.store.writer import BLOBS

COMPILERS = ("g++", "clang++")
MOST_COMPILERS = 2
"""C++ compilers at work at once."""

TOOLCHAIN = "toolchain"


def compile_cache_root(artifact: Artifact | None = None) -> Path:
    """The folder of all compiled kernels: in the artifact's store; in the default one where it lies in none.

    It is made where it is not there.

    Raises: PipelineError where somebody else owns it or may write to it.
    """
    store = default_store_path()
    if artifact is not None:
        home = artifact.blobs.absolute()
        if home.name == BLOBS and (home.parent / "artifacts").is_dir():  # an exported model's folder is no store
            store = home.parent
    root = store / "compiled"
    root.parent.mkdir(parents=True, exist_ok=True)
    return private_folder(root)


def artifact_cache(artifact: Artifact, *, threads: int, version: str) -> Path:
    """The folder of one artifact's kernels; it need not be there.

    The number of threads is part of its name, as it is written into the kernels.
    """
    facets = describe_host().facets()
    own = {"artifact": artifact.digest, "threads": threads, "version": version, "host": facets}
    return compile_cache_root(artifact) / hashlib.sha256(canonical_json(own)).hexdigest()


def forget(folder: Path) -> bool:
    """Remove compiled kernels; whether there were any. Processes that run them have them mapped and go on."""
    doomed = folder.with_name(f".{secrets.token_hex(8)}")
    try:
        folder.rename(doomed)
    except FileNotFoundError:
        return False
    shutil.rmtree(doomed, ignore_errors=True)  # one that writes there still may keep it from going; it is never read
    return True


def private_folder(path: Path) -> Path:
    """Make the folder for its owner alone, or check that it is one that nobody else can write to.

    Raises: PipelineError where it is not.
    """
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise PipelineError(f"no folder for compiled code: {error}") from error
    found = path.lstat()
    mine = not hasattr(os, "getuid") or found.st_uid == os.getuid()
    if not stat.S_ISDIR(found.st_mode) or not mine or (os.name == "posix" and found.st_mode & 0o022):
        raise PipelineError(
            f"{path} holds compiled code, and others than its owner may have written there: it is not run",
            hint="remove it, or set PIPELINE_STORE to a folder of your own",
        )
    return path


def _kernel_folder(path: Path) -> Path:
    """A private folder inside the root of compiled code, where one that torch made anew is closed to others again.

    A cold load takes the folder away, and another process that compiles just then has torch make it again, as the
    umask says. Nobody else could come that far: the root is for its owner alone.

    Raises: PipelineError where the root is not private, or what lies there is a link or somebody else's.
    """
    if os.name == "posix" and _is_mine(path.parent, 0o077) and _is_mine(path, 0):
        with suppress(FileNotFoundError):  # taken away just now
            path.chmod(0o700)
    return private_folder(path)


def _is_mine(path: Path, forbidden: int) -> bool:
    """Whether it is a folder, no link, of this user, with none of the `forbidden` bits in its mode."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & forbidden


def require_compiler() -> None:
    """Raises: HostError where there is no C++ compiler."""
    if not os.environ.get("CXX") and not any(map(shutil.which, COMPILERS)):
        raise HostError("torch.compile needs a C++ compiler and this host has neither g++ nor clang++; install one")


def prepare_toolchain(root: Path) -> None:
    """Import torch's compiler and find out what the C++ compiler can do. Compiles a few lines, once a store.

    `root` is the folder of all compiled kernels.
    """
    require_compiler()
    folder = _kernel_folder(root / TOOLCHAIN)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)  # before the import, which would make one elsewhere
    os.environ["TORCH_WARM_POOL"] = "0"  # no pool of processes beside the one that is measured
    import_module("torch._inductor.compile_fx")
    from torch._inductor import codecache, config, cpu_vec_isa

    if not os.environ.get("CXX") and not shutil.which("g++"):
        config.cpp.cxx = (None, "clang++")
    # the precompiled header, which halves the time of compiling, has a fixed place in the folder for temporary files
    if hasattr(codecache, "_HEADER_DIR") and shutil.which("openssl"):  # torch takes the header's digest with it
        codecache._HEADER_DIR = str(folder / "headers")
        codecache._HEADER_LOCK_DIR = str(folder / "headers" / "locks")
    else:
        config.cpp_cache_precompile_headers = False
    cpu_vec_isa.pick_vec_isa()  # remembered by this process


def use(folder: Path, *, device: str, threads: int) -> None:
    """Have this process keep what it compiles in the folder, and take from there what is compiled already.

    Raises: PipelineError where others may write to it; HostError where there is no C++ compiler.
    """
    prepare_toolchain(folder.parent)
    from torch._inductor import config

    if device == "cpu":
        # the residual stream is written out after each layer, and not summed anew from all before:
        # the layers have the same kernels then, and there is half as much to compile
        config.realize_reads_threshold = 1
        # C++ is compiled from threads, other kernels would be from processes; each compiler takes some 250 MB
        config.compile_threads = min(threads, MOST_COMPILERS)
    else:
        config.compile_threads = 1
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(_kernel_folder(folder))
    with suppress(OSError):  # another process's cold load took it away; torch makes it again
        os.utime(folder)  # garbage collection counts from there
