"""The paced engine and the tenants, as the configuration of a deployment."""

from pathlib import Path
from typing import Any

from benchmarks.overload.scenario import SEQUENCES, STEP_S, WEIGHTS
from benchmarks.targets.running import MODEL
from cluster.admission.keys import KeyEntry, KeyFileContents, TenantEntry, digest, new_key
from cluster.key_file import write_keys


def generator() -> dict[str, Any]:
    """An engine of ``SEQUENCES`` requests at a time, ``STEP_S`` for a token of each."""
    sim = {"decode_s_per_token": STEP_S, "max_num_seqs": SEQUENCES}
    return {"name": MODEL, "model": MODEL, "engine": "sim", "sim": sim}


def write_tenants(path: Path) -> dict[str, str]:
    """A key file with a key for each tenant; returns the keys."""
    keys = {tenant: new_key() for tenant in WEIGHTS}
    entries = {tenant: TenantEntry(weight=weight) for tenant, weight in WEIGHTS.items()}
    hashes = tuple(KeyEntry(sha256=digest(key), tenant=name) for name, key in keys.items())
    write_keys(path, KeyFileContents(tenants=entries, keys=hashes))
    return keys
