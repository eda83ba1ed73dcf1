"""Probes: told apart by what is on the path, without importing it."""

import sys

import pytest

from megatron_moo.platform import probes


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package(name, *subpackages)` makes an importable package whose import fails."""

    def make(name: str, *subpackages: str) -> None:
        for folder in (name, *(f"{name}/{sub}" for sub in subpackages)):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "__init__.py").write_text("raise RuntimeError('imported by a probe')")

    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("apex", "transformer_engine"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return make


def test_another_project_named_apex_is_refused(package):
    """Would catch: Megatron taking PyPI's apex for NVIDIA's, which fails deep inside its optimizer."""
    package("apex", "models")
    assert probes.nvidia_apex_status() == "pypi"
    with pytest.raises(RuntimeError, match="apex.*found another project.*pip uninstall apex"):
        probes.require_no_pypi_apex()


def test_nvidias_apex_is_welcome(package):
    """Would catch: refusing the fused optimizers of a machine that has them."""
    package("apex", "optimizers", "multi_tensor_apply")
    assert probes.nvidia_apex_status() == "nvidia"
    probes.require_no_pypi_apex()


def test_nothing_installed_is_fine():
    """Would catch: a probe that needs what it looks for."""
    if probes.nvidia_apex_status() == "absent":
        probes.require_no_pypi_apex()
