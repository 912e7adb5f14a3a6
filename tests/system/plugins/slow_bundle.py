"""Crash bundles take four seconds more, as when other ranks answer late."""

import time

from skyrl.distributed.hang_monitor import Court

_real = Court.leave_bundle
Court.leave_bundle = lambda self, report: (time.sleep(4), _real(self, report))[1]
