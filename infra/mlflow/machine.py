"""What the machine is doing, for the tracker."""

import sys


def measure() -> dict[str, float]:
    """The machine, by MLflow's names for its own page of system metrics; GPU memory once torch uses a GPU."""
    import psutil

    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage("."), psutil.net_io_counters()
    values = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/process_memory_megabytes": psutil.Process().memory_info().rss / 1e6,
        "system/disk_usage_percentage": disk.percent,
        "system/disk_available_megabytes": disk.free / 1e6,
        "system/network_receive_megabytes": network.bytes_recv / 1e6,
        "system/network_transmit_megabytes": network.bytes_sent / 1e6,
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        values["system/gpu_0_memory_usage_megabytes"] = (total - free) / 1e6
        values["system/gpu_0_memory_usage_percentage"] = 100 * (1 - free / total)
    return values
