"""Targets and the machine that we are on.

`HardwareProfile` describes a target, `Host` this machine. What has to be measured is in `pipeline.hardware.probe`,
which is not imported here: it runs as a module of its own, and most commands never need it.
"""

from pipeline.hardware.host import Gpu, Host, describe_host
from pipeline.hardware.profile import HardwareProfile, load_profile, local_profile, profile_names

__all__ = ["Gpu", "HardwareProfile", "Host", "describe_host", "load_profile", "local_profile", "profile_names"]
