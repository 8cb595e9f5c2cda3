"""Names the columns of the tables that a launch reads, as ``csrc/step.h`` and ``csrc/scalars.h`` do.

The tables of a launch on a GPU, which ``gpu.py`` fills:

rows     int64 [., COLUMNS], one for each tensor
chunks   int32 [., 2]: a row, and the index of the chunk in its tensor; one program (a block of threads) each
scalars  float32 [., SCALARS]: the scalars of a rule, and the step
hyper    float64 [., HYPERS]: what scalars are computed from, where only the device knows the step
rates    int64 [.]: beside hyper, addresses of learning rates that are tensors: of a float64, or the complement of a
         float32's; 0 where hyper has the rate
"""

# Columns of rows.
COL_PARAM = 0  # the address of the parameter
COL_GRAD = 1  # the address of its gradient
COL_STATE = 2  # addresses of up to 3 states: Adam has m, v, vmax; SGD has b; codes, where they are int8
COL_NUMEL = 5  # its complement, which is negative, where a step leaves the row out
COL_SCALARS = 6  # the index of the row of scalars
COL_FLAGS = 7  # ALIGNED, SHARD_ALIGNED, EMA_BF16
COL_EXTRA = 8  # the address of what the master holds
COL_SCALES = 9  # addresses of the scales of the first 2 states
COL_EMA = 11  # the address of the average of the parameter; 0 where none is kept
COL_SEED = 12  # from here on: of stochastic rounding
COL_INDEX = 13  # of the parameter
COL_OFFSET = 14  # element i of the row is element offset + i + i / run * skip of the parameter
COL_RUN = 15
COL_SKIP = 16
COLUMNS = 18  # an even number, so that what follows the rows is aligned to 16 bytes
STATES = COL_NUMEL - COL_STATE
ADDRESSES = (COL_PARAM, COL_GRAD, *range(COL_STATE, COL_NUMEL), COL_EXTRA, *range(COL_SCALES, COL_SEED))

# Bits of COL_FLAGS.
SHARD_ALIGNED = 2  # offset, run and skip are multiples of 8, or nothing is drawn by them
ALIGNED = 1  # SHARD_ALIGNED, and every address is a multiple of 16
EMA_BF16 = 4  # the average is a bfloat16, rounded stochastically; else a float32

# Columns of scalars, by family; the fields of scalars.Adam, scalars.Bound and scalars.Sgd.
SCALAR_DECAY, SCALAR_L2, SCALAR_GRAD_FACTOR = 0, 1, 2
SCALAR_W1, SCALAR_W2, SCALAR_STEP_SIZE, SCALAR_INV_SQRT_BC2, SCALAR_EPS = 3, 4, 5, 6, 7
SCALAR_MOMENTUM, SCALAR_C1, SCALAR_C2, SCALAR_TAKE_G, SCALAR_TAKE_B = 3, 4, 5, 6, 7
SCALAR_STEP = 8
SCALAR_EMA = 9  # how much of the new parameter its average takes
SCALAR_LO, SCALAR_HI = SCALAR_INV_SQRT_BC2, 10  # AdaBound's
SCALARS = 11
SCALARS_BYTES = 4 * SCALARS

# Columns of hyper, by family. The decay is lr / base_lr * HYPER_DECAY, so a base_lr of 1 makes it torch's.
HYPER_LR = 0  # what multiplies it where only the device can read it, by its address in rates
HYPER_BASE_LR = 1
HYPER_DECAY = 2  # decoupled weight decay
HYPER_L2 = 3  # weight decay that is added to the gradient
HYPER_SIGN = 4  # -1 to maximize
HYPER_BETA1, HYPER_BETA2, HYPER_EPS = 5, 6, 7
HYPER_MOMENTUM, HYPER_DAMPENING, HYPER_FLAGS = 5, 6, 7
HYPER_RECTIFY = 8  # 0, or what RAdam does
HYPER_EMA_DECAY = 9  # of the average of the parameter
HYPER_EMA_WARMUP = 10  # 1 where that decay grows to its value, else 0
HYPER_FINAL = 11  # of AdaBound: final_lr / base_lr
HYPER_GAMMA = 12  # of AdaBound; 0 of the others
HYPERS = 13

# Bits of HYPER_FLAGS.
NESTEROV, LR_IN_MOMENTUM = 1, 2
# Values of HYPER_RECTIFY: until the second moment tells enough, RAdam steps as SGD, or waits.
RECTIFY, RECTIFY_OR_WAIT = 1, 2
