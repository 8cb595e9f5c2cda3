// A driver of CUDA whose functions do nothing and succeed: Triton's launcher calls it where there is no GPU,
// so that what it does before is measured. Only functions that Triton refers to are here.
#define NOTHING(name)                                                                                        \
  int name(void) { return 0; }
#define NUMBER(name)                                                                                         \
  int name(int* to) { return *to = 1 << 17, 0; }
#define HANDLE(name)                                                                                         \
  int name(void** to) { return *to = to, 0; }

NOTHING(cuInit)
NOTHING(cuCtxSetCurrent)
NOTHING(cuCtxSetLimit)
NOTHING(cuFuncSetAttribute)
NOTHING(cuFuncSetCacheConfig)
NOTHING(cuGetErrorString)
NOTHING(cuLaunchKernelEx)
NOTHING(cuModuleUnload)
NOTHING(cuOccupancyMaxActiveClusters)
NOTHING(cuPointerGetAttribute)
NOTHING(cuStreamIsCapturing)
NOTHING(cuTensorMapEncodeIm2col)
NOTHING(cuTensorMapEncodeTiled)
NUMBER(cuCtxGetLimit)
NUMBER(cuDeviceGet)
NUMBER(cuDeviceGetAttribute)
NUMBER(cuDriverGetVersion)
NUMBER(cuFuncGetAttribute)
HANDLE(cuCtxGetCurrent)
HANDLE(cuCtxGetDevice)
HANDLE(cuDevicePrimaryCtxRetain)
HANDLE(cuModuleGetFunction)
HANDLE(cuModuleLoadData)
