"""The server of lorarep: gRPC and HTTP over the runtime, and the command line."""

import os

# gRPC's core writes to standard error without the log, and its threads would block on a pipe that nobody reads.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
