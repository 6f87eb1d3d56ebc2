"""Numbers that several rooms share: what is taken where nobody says otherwise."""

MAX_TOKENS = 2048  # of an answer
PREFILL_STEP = 2048  # tokens of a prompt that are read at once
PREFILL_STEP_LIMIT = 65_536  # with more, arrays of the 48B would pass kernels' 32-bit indices
SNAPSHOT_EVERY = 4096  # tokens within a turn: two prefill steps
SNAPSHOT_MEMORY = 1 << 30  # bytes: 24 KDA states of the 48B
SNAPSHOTS = 256  # at most: each turn goes over all of them
# Set in the environment, no kernel is tried at a first load: what is known counts, or defaults.
NO_TUNE = "MLX_KIMI_NO_TUNE"
CACHE_DISK = 4 * 10**9  # bytes of what a server stores: 90 states of the 48B, with 60,000 tokens
AUTOSAVE_LIMIT = 5 * 10**9  # bytes: sixteen chats of the 48B, or two thousand of the pocket model
CONTEXT = 32_768  # tokens that a memory budget leaves room for
WINDOW = 512  # tokens that `evaluate` reads together, each window from nothing
EVALUATED_TOKENS = 2048  # of its text
REPORTED_TOKENS = 1024  # of the text of `convert --report`, all in memory at once
