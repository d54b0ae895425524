"""Provenance: of this process, and the commit only where the package is part of a checkout."""

import platform
import subprocess
from pathlib import Path

import torch
import transformers

from momify.report.provenance import Origin, collect_provenance, commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "init.defaultBranch=main"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_versions_and_machine() -> None:
    found = collect_provenance(Origin("gpt2", "00", 3))
    assert found.versions["python"] == platform.python_version()
    assert found.versions["torch"] == torch.__version__
    assert found.versions["transformers"] == transformers.__version__
    assert found.machine["threads"] == torch.get_num_threads()
    assert found.machine["processor"]
    assert found.origin.seed == 3


def test_commit(tmp_path: Path) -> None:
    package = tmp_path / "repository" / "momify"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert commit(package) is None  # no repository
    git(package.parent, "init")
    (package.parent / "theirs").write_text("")
    git(package.parent, "add", "theirs")
    git(package.parent, "commit", "-m", "x")
    assert commit(package) is None  # a repository that does not hold the package: somebody else's
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-m", "x")
    assert commit(package) == git(package, "rev-parse", "HEAD")
    (package / "__init__.py").write_text("changed")
    assert commit(package) == git(package, "rev-parse", "HEAD") + "-dirty"
    assert commit(tmp_path / "nowhere") is None
