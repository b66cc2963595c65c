"""What the machine is doing, by MLflow's own monitors.

MLflow's thread around them ends for good when its server is away for a moment: ours puts what they measure into the
outbox, like everything else that a run says.
"""

import contextlib


class MachineMonitor:
    """CPU, memory, disk, network since it was made, and GPUs where there are any."""

    def __init__(self) -> None:
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(ImportError, RuntimeError):  # no GPU, or nothing that could ask it
            self.monitors.append(GPUMonitor())

    def measure(self) -> dict[str, float]:
        """By MLflow's names for its page of system metrics; what a container hides is left out."""
        values: dict[str, float] = {}
        for monitor in self.monitors:
            with contextlib.suppress(OSError, ValueError):
                monitor.collect_metrics()
                values |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": float(value) for name, value in values.items()}
