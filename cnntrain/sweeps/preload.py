"""What the server of members' processes imports before it forks them.

It is started with SIGINT blocked. While it imports, SIGINT ends it without a traceback; afterwards
`multiprocessing` ignores SIGINT there.
"""

import os
import signal

signal.signal(signal.SIGINT, lambda *_: os._exit(130))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])

import cnntrain.training  # noqa: E402, F401
