"""The server of lorarep: gRPC and HTTP over the runtime, and the command line."""

import os

# gRPC's core writes to standard error itself, past the log, and its threads stand still when nobody reads that.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
