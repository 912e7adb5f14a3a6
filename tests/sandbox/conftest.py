import os
import sys

import pytest


@pytest.fixture(scope="session")
def other_users_python():
    """An interpreter for sandboxes without namespaces: root's are another user, who cannot reach one in root's home."""
    hidden = os.geteuid() == 0 and os.path.realpath(sys.executable).startswith("/root/")
    if hidden and not os.access("/usr/bin/python3", os.X_OK):
        pytest.skip("this Python lies below /root, and there is no other")
    return "/usr/bin/python3" if hidden else sys.executable
