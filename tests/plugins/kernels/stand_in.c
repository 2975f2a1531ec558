/* A CUDA driver that runs nothing and writes down what it is asked for. The kernel's arguments are read as the driver
   reads them: argument i is at the address parameters[i]; how wide it is, the PTX's parameter list says. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>

static char widths[64];
static int count;

static FILE *record(void) {
    static FILE *file;
    if (!file) file = fopen(getenv("STAND_IN_RECORD"), "w");
    return file;
}
#define SAY(...) do { fprintf(record(), __VA_ARGS__); fflush(record()); } while (0)

int cuInit(unsigned flags) { SAY("cuInit %u\n", flags); return getenv("STAND_IN_NO_GPU") ? 100 : 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = attribute == 75 ? 9 : 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)0x1234; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { SAY("release %d\n", device); return 0; }
int cuCtxSetCurrent(void *context) { SAY("context %lx\n", (long)context); return 0; }
int cuCtxSynchronize(void) { SAY("synchronize\n"); return 0; }
int cuModuleUnload(void *module) { SAY("unload %lx\n", (long)module); return 0; }
int cuGetErrorString(int status, const char **text) { *text = status == 100 ? "no device" : "bad image"; return 0; }

int cuModuleLoadDataEx(void **module, const char *ptx, unsigned options, int *names, void **values) {
    const char *end = strstr(ptx, ")");
    count = 0;
    for (const char *at = strstr(ptx, ".param"); at && at < end; at = strstr(at + 1, ".param"))
        widths[count++] = strncmp(at, ".param .u64", 11) ? 4 : 8;
    if (!strstr(ptx, ".entry")) {
        if (options != 2 || names[0] != 5 || names[1] != 6) return 1;
        snprintf(values[0], (size_t)values[1], "ptxas fatal: no entry");
        return 218;
    }
    *module = (void *)0xabc;
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) {
    SAY("function %s of %lx\n", name, (long)module);
    *function = (void *)0xdef;
    return 0;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    SAY("launch %lx grid %u %u %u block %u %u %u shared %u stream %lx extra %lx arguments", (long)function, gx, gy, gz,
        bx, by, bz, shared, (long)stream, (long)extra);
    for (int i = 0; i < count; i++)
        SAY(" %llx", widths[i] == 8 ? (unsigned long long)*(uint64_t *)parameters[i]
                                    : (unsigned long long)*(uint32_t *)parameters[i]);
    SAY("\n");
    return 0;
}
int cuEventCreate(void **event, unsigned flags) { static long next; *event = (void *)++next; return 0; }
int cuEventRecord(void *event, void *stream) { SAY("event %ld\n", (long)event); return 0; }
int cuEventSynchronize(void *event) { return 0; }
int cuEventElapsedTime(float *milliseconds, void *start, void *end) { *milliseconds = 1.5f; return 0; }
int cuEventDestroy_v2(void *event) { return 0; }
