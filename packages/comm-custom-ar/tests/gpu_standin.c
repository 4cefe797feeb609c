/* GPUs that are not there: the functions of libcuda.so.1, libnvidia-ml.so.1 and libcommplane_car.so that the package calls, in one
 * library, for tests on machines without any. GPU memory is files that processes map. What the machine looks like and what goes wrong
 * is in the environment, looked up at each call:
 *
 *   STANDIN_GPUS     product names by PCI bus id, "H200,H200"; names that begin with H are compute capability 9.0, others 8.9
 *   STANDIN_FASTEST  the order in which CUDA numbers them, "1,0"
 *   STANDIN_MIG      numbers of GPUs that are split into MIG instances
 *   STANDIN_HIDDEN   numbers of GPUs that NVML may not show
 *   STANDIN_LINK     "nvlink", "pcie" or "none"
 *   STANDIN_MPS      0, 1, or "old" for a driver that does not know
 *   STANDIN_NO_CUDA, STANDIN_NO_NVML   the library does not start
 *   STANDIN_MEMORY   folder of the files
 *   STANDIN_FAULT    what the memory of this process does wrong
 */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define MOST 16

static const char *setting(const char *name, const char *otherwise) {
  const char *value = getenv(name);
  return value ? value : otherwise;
}

static int listed(const char *name, int number) {
  char list[128], *rest = list;
  snprintf(list, sizeof list, "%s", setting(name, ""));
  for (char *one; (one = strsep(&rest, ",")) != NULL;)
    if (*one && atoi(one) == number) return 1;
  return 0;
}

static int gpus(char names[MOST][32]) {
  char list[256], *rest = list;
  int count = 0;
  snprintf(list, sizeof list, "%s", setting("STANDIN_GPUS", "H200,H200"));
  for (char *one; (one = strsep(&rest, ",")) != NULL && count < MOST;)
    if (*one) snprintf(names[count++], 32, "%s", one);
  return count;
}

/* Of an entry in CUDA_VISIBLE_DEVICES: a number, or a UUID of which two digits are enough here. */
static int entry(const char *text) {
  if (!strncmp(text, "GPU-", 4)) return (int)strtol((char[]){text[4], text[5], 0}, NULL, 16) - 0xa0;
  return *text ? atoi(text) : -1;
}

/* Number by PCI bus id of the GPU that CUDA numbers so, of those that CUDA_VISIBLE_DEVICES leaves; -1 for none. */
static int numbered(int ordinal) {
  char names[MOST][32], list[128], *rest = list;
  int count = gpus(names), at = 0;
  const char *order = setting("STANDIN_FASTEST", ""), *shown = getenv("CUDA_VISIBLE_DEVICES");
  if (shown != NULL) {
    snprintf(list, sizeof list, "%s", shown);
    int found = -1;
    for (char *one; (one = strsep(&rest, ",")) != NULL; at++)
      if (at == ordinal) found = entry(one);
    ordinal = found;
  }
  if (ordinal < 0 || ordinal >= count) return -1;
  return *order ? order[2 * ordinal] - '0' : ordinal;
}

/* --- libcuda ------------------------------------------------------------------------------------------------------------------- */

int cuInit(unsigned flags) {
  (void)flags;
  if (getenv("STANDIN_NO_CUDA")) return 999;
  return numbered(0) < 0 ? 100 : 0;
}
int cuGetErrorString(int code, const char **text) {
  *text = code == 999 ? "unknown error" : "some error";
  return 0;
}
int cuDriverGetVersion(int *version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int *count) {
  for (*count = 0; numbered(*count) >= 0;) ++*count;
  return 0;
}
int cuDeviceGet(int *device, int ordinal) {
  *device = numbered(ordinal);
  return *device < 0 ? 101 : 0;
}
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  char names[MOST][32];
  gpus(names);
  if (attribute == 75) *value = names[device][0] == 'H' ? 9 : 8;
  else if (attribute == 76) *value = names[device][0] == 'H' ? 0 : 9;
  else if (attribute == 133 && strcmp(setting("STANDIN_MPS", "0"), "old")) *value = atoi(setting("STANDIN_MPS", "0"));
  else return 1;
  return 0;
}
int cuDeviceGetName(char *name, int length, int device) {
  char names[MOST][32];
  gpus(names);
  snprintf(name, length, "%s", names[device]);
  return 0;
}
int cuDeviceGetPCIBusId(char *id, int length, int device) {
  snprintf(id, length, "0000:%02x:00.0", 16 + device);
  return 0;
}
int cuDeviceGetUuid(char *uuid, int device) {
  memset(uuid, 0xa0 + device, 16);
  return 0;
}
int cuDeviceGetUuid_v2(char *uuid, int device) {
  memset(uuid, (listed("STANDIN_MIG", device) ? 0xb0 : 0xa0) + device, 16);
  return 0;
}

/* --- libnvidia-ml -------------------------------------------------------------------------------------------------------------- */

static void *handle_of(int gpu) { return (void *)(uintptr_t)(0x7f0000000000 + gpu); } /* wider than an int, as real ones are */
static int gpu_of(void *handle) { return (int)((uintptr_t)handle - 0x7f0000000000); }
static void uuid_of(int gpu, char *out) {
  sprintf(out, "GPU-%1$02x%1$02x%1$02x%1$02x-%1$02x%1$02x-%1$02x%1$02x-%1$02x%1$02x-%1$02x%1$02x%1$02x%1$02x%1$02x%1$02x", 0xa0 + gpu);
}

int nvmlInit_v2(void) { return getenv("STANDIN_NO_NVML") ? 9 : 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int code) { return code == 9 ? "Driver Not Loaded" : "Some Error"; }
int nvmlSystemGetDriverVersion(char *version, unsigned length) {
  snprintf(version, length, "%s", setting("STANDIN_DRIVER", "580.95.05"));
  return 0;
}
int nvmlDeviceGetCount_v2(unsigned *count) {
  char names[MOST][32];
  *count = gpus(names);
  return 0;
}
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = handle_of(index);
  return listed("STANDIN_HIDDEN", index) ? 4 : 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle) {
  char names[MOST][32], own[64];
  int count = gpus(names);
  for (int gpu = 0; gpu < count; gpu++) {
    uuid_of(gpu, own);
    if (!strcmp(own, uuid) && !listed("STANDIN_HIDDEN", gpu)) {
      *handle = handle_of(gpu);
      return 0;
    }
  }
  return 6;
}
int nvmlDeviceGetUUID(void *handle, char *uuid, unsigned length) {
  char own[64];
  uuid_of(gpu_of(handle), own);
  snprintf(uuid, length, "%s", own);
  return 0;
}
int nvmlDeviceGetName(void *handle, char *name, unsigned length) { return cuDeviceGetName(name, length, gpu_of(handle)); }
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  return cuDeviceGetAttribute(major, 75, gpu_of(handle)) | cuDeviceGetAttribute(minor, 76, gpu_of(handle));
}
int nvmlDeviceGetMigMode(void *handle, unsigned *current, unsigned *pending) {
  *current = *pending = listed("STANDIN_MIG", gpu_of(handle));
  return 0;
}
int nvmlDeviceGetP2PStatus(void *one, void *other, unsigned index, unsigned *status) {
  const char *link = setting("STANDIN_LINK", "nvlink");
  if (one == other) return 2;
  if (!strcmp(link, "none")) *status = 1;
  else if (!strcmp(link, "pcie")) *status = index == 2 ? 5 : 0;
  else *status = index == 4 ? 5 : 0; /* NVLink does not say that the pair shares a PCIe switch */
  return 0;
}

/* --- libcommplane_car ---------------------------------------------------------------------------------------------------------- */

static _Thread_local char problem[200];
static int fault(const char *which) { return !strcmp(setting("STANDIN_FAULT", ""), which); }
static int fails(const char *text) {
  snprintf(problem, sizeof problem, "%s", text);
  return -5;
}
static int acts(const char *step) {
  char hangs[32], dies[32];
  snprintf(hangs, sizeof hangs, "%s hangs", step);
  snprintf(dies, sizeof dies, "%s dies", step);
  if (fault(hangs))
    for (;;) pause();
  if (fault(dies)) raise(SIGKILL);
  return 0;
}

struct memory {
  void *at;
  uint64_t bytes;
  int mine;
};
static struct memory known[64];

static int map_file(const char *path, uint64_t bytes, int create, void **out) {
  int file = open(path, O_RDWR | (create ? O_CREAT | O_EXCL : 0), 0600);
  if (file < 0 || (create && ftruncate(file, (off_t)bytes) != 0)) return fails("no such memory");
  *out = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (*out == MAP_FAILED) return fails("cannot map");
  for (int i = 0; i < 64; i++)
    if (known[i].at == NULL) {
      known[i] = (struct memory){*out, bytes, create};
      return 0;
    }
  return fails("too many");
}
static int unmap(void *at) {
  for (int i = 0; i < 64; i++)
    if (known[i].at == at) {
      munmap(at, known[i].bytes);
      known[i].at = NULL;
      return 0;
    }
  return fails("not mapped");
}
static int is_mine(const void *at) {
  for (int i = 0; i < 64; i++)
    if (known[i].at != NULL && (const char *)at >= (char *)known[i].at && (const char *)at < (char *)known[i].at + known[i].bytes)
      return known[i].mine;
  return -1;
}

const char *commplane_car_last_error(void) { return problem; }
int commplane_car_cuda_check(void) { return fault("no driver") ? fails("no CUDA driver is loaded") : 0; }
int commplane_car_cuda_memory_alloc(int device, uint64_t bytes, void **out, unsigned char handle[64]) {
  char path[512];
  acts("alloc");
  if (fault("alloc fails")) return fails("out of memory");
  memset(handle, 0, 64);
  snprintf((char *)handle, 64, "%d-%d-%llu", device, (int)getpid(), (unsigned long long)bytes);
  snprintf(path, sizeof path, "%s/%s", setting("STANDIN_MEMORY", "/nowhere"), (char *)handle);
  return map_file(path, bytes, 1, out);
}
int commplane_car_cuda_memory_open(int device, const unsigned char handle[64], void **out) {
  char path[512];
  unsigned long long bytes = 0;
  (void)device;
  acts("open");
  if (fault("open fails")) return fails("invalid device context");
  sscanf((const char *)handle, "%*d-%*d-%llu", &bytes);
  snprintf(path, sizeof path, "%s/%s", setting("STANDIN_MEMORY", "/nowhere"), (const char *)handle);
  return map_file(path, bytes, 0, out);
}
int commplane_car_cuda_memory_close(int device, void *opened) {
  (void)device;
  return unmap(opened);
}
int commplane_car_cuda_memory_free(int device, void *allocated) {
  (void)device;
  return unmap(allocated);
}
int commplane_car_cuda_memory_poke(int device, void *at, uint64_t words, uint32_t value) {
  static int calls;
  int mine = is_mine(at);
  (void)device;
  acts("poke");
  if (mine < 0) return fails("not mapped");
  /* Of a pair of GPUs: the first 64 KiB of patterns arrive, what comes later does not. */
  if (fault("poke goes stale") && !mine && calls++ > 0) return 0;
  for (uint64_t i = 0; i < words; i++) ((uint32_t *)at)[i] = value + (uint32_t)i;
  if (fault("poke goes wrong") && !mine) ((uint32_t *)at)[words - 1] ^= 1;
  return 0;
}
int commplane_car_cuda_memory_peek(int device, const void *at, uint64_t words, uint32_t value, uint64_t *wrong) {
  int mine = is_mine(at);
  (void)device;
  acts("peek");
  if (mine < 0) return fails("not mapped");
  *wrong = fault("peek goes wrong") && !mine ? 7 : 0;
  for (uint64_t i = 0; i < words; i++) *wrong += ((const uint32_t *)at)[i] != value + (uint32_t)i;
  return 0;
}
