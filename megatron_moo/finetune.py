"""``python -m megatron_moo.finetune``: see :mod:`megatron_moo.training.finetune`."""

import os
import sys


def main() -> None:
    """Probe and prepare the platform before Megatron is imported, then run."""
    # Imported here: a process that Megatron spawns while it saves imports this module again, and must not pay for
    # torch.
    from megatron_moo.platform import cpu, probes, repairs

    try:
        probes.require_no_pypi_apex()
    except RuntimeError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    if cpu.install():
        sys.argv += missing_flags(cpu.CPU_FLAGS, sys.argv[1:])
    else:
        repairs.install()
    from megatron_moo.training.finetune import run

    run()


def missing_flags(flags: tuple[str, ...], argv: list[str]) -> list[str]:
    """Those of ``flags`` (options followed by their values) that a command line does not decide itself."""
    given = {item.partition("=")[0] for item in argv}
    missing: list[str] = []
    wanted = False
    for item in flags:
        if item.startswith("--"):
            wanted = item not in given
        if wanted:
            missing.append(item)
    return missing


if __name__ == "__main__":
    main()
