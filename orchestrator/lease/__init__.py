"""Who runs a stage: one process at a time, of all machines that see the run root."""

from orchestrator.lease.held import Lease, held
from orchestrator.lease.places import InFolder, InStore, Place

__all__ = ["InFolder", "InStore", "Lease", "Place", "held"]
