"""What a client trains: PEFT's B·diag(E)·A layers on a frozen backbone. torch and peft, no flwr."""

import logging
import os
import warnings

# oneDNN keeps a compiled product for each of the last 1024 shapes it saw: with texts of all lengths hundreds of MB in bfloat16.
# Compiling one again takes no time that could be measured.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

# peft imports it where it is installed; it would warn then of a kernel that is missing, and later with every pass of a cast
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
# it also compiles at import, for which torch loads a module of its own that it warns of; Flower shows what Python would hide
warnings.filterwarnings("ignore", message="`torch.jit.script_method` is ", category=DeprecationWarning)
