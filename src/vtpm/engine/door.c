/* The compiled side of the door to libtpms; _build.py says why it is C and declares what Python sees of it. */
#include <errno.h>
#include <limits.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <libtpms/tpm_error.h>
#include <libtpms/tpm_library.h>
#include <libtpms/tpm_tis.h>

/* Since 0.10. Weak: one build runs with older and newer libraries. */
extern TPM_RESULT TPMLIB_SetProfile(const char *profile) __attribute__((weak));
extern TPM_BOOL TPMLIB_WasManufactured(void) __attribute__((weak));

#define VTPM_MAX_COMMAND_BYTES 4096

struct vtpm_response { unsigned char *data; uint32_t size; uint32_t capacity; };

static uint32_t vtpm_load(unsigned char **data, uint32_t *length, const char *name);
static uint32_t vtpm_store(const unsigned char *data, uint32_t length, const char *name);
static uint32_t vtpm_delete(const char *name, bool must_exist);

static uint32_t vtpm_locality;

/* Of plain commands; set by another thread while vtpm_serve runs, before it answers the client that asked. */
static _Atomic uint32_t vtpm_default_locality;

/* Whether libtpms wrote or deleted state during the command. */
static bool vtpm_state_changed;

static void vtpm_set_default_locality(uint32_t locality) { vtpm_default_locality = locality; }

static TPM_RESULT vtpm_ready(void) { return TPM_SUCCESS; }

static TPM_RESULT vtpm_get_locality(TPM_MODIFIER_INDICATOR *locality, uint32_t tpm_number)
{
    (void)tpm_number;
    *locality = vtpm_locality;
    return TPM_SUCCESS;
}

static TPM_RESULT vtpm_get_physical_presence(TPM_BOOL *presence, uint32_t tpm_number)
{
    (void)tpm_number;
    *presence = 0;
    return TPM_SUCCESS;
}

static TPM_RESULT vtpm_load_data(unsigned char **data, uint32_t *length, uint32_t tpm_number,
                                 const char *name)
{
    (void)tpm_number;
    *data = NULL;
    *length = 0;
    return vtpm_load(data, length, name);
}

static TPM_RESULT vtpm_store_data(const unsigned char *data, uint32_t length, uint32_t tpm_number,
                                  const char *name)
{
    (void)tpm_number;
    vtpm_state_changed = true;
    return vtpm_store(data, length, name);
}

static TPM_RESULT vtpm_delete_name(uint32_t tpm_number, const char *name, TPM_BOOL must_exist)
{
    (void)tpm_number;
    vtpm_state_changed = true;
    return vtpm_delete(name, must_exist != 0);
}

static void vtpm_register(void)
{
    struct libtpms_callbacks callbacks = {
        .sizeOfStruct = sizeof(callbacks),
        .tpm_nvram_init = vtpm_ready,
        .tpm_nvram_loaddata = vtpm_load_data,
        .tpm_nvram_storedata = vtpm_store_data,
        .tpm_nvram_deletename = vtpm_delete_name,
        .tpm_io_init = vtpm_ready,
        .tpm_io_getlocality = vtpm_get_locality,
        .tpm_io_getphysicalpresence = vtpm_get_physical_presence,
    };

    TPMLIB_RegisterCallbacks(&callbacks);
    /* At level 0 libtpms still dumps the command on which it fails, authorisation values and all, on standard
       error unless a descriptor is set. This one cannot be open, so the dump goes nowhere. */
    TPMLIB_SetDebugFD(INT_MAX);
    TPMLIB_SetDebugLevel(0);
}

static uint32_t vtpm_process(const char *command, uint32_t size, uint32_t locality,
                             struct vtpm_response *response)
{
    static unsigned char copy[VTPM_MAX_COMMAND_BYTES];
    TPM_RESULT result;

    if (size > sizeof(copy))
        return TPM_SIZE;
    memcpy(copy, command, size);
    vtpm_locality = locality;
    response->size = 0;
    result = TPMLIB_Process(&response->data, &response->size, &response->capacity, copy, size);
    explicit_bzero(copy, size);
    return result;
}

/*
 * The hot path: plain TPM commands that come whole and change no state are answered without a step through Python.
 * Whatever is not exactly that ends the loop, with nothing lost: see Served in engine.py. The guest's bytes are
 * looked at here for one thing, that the size in the header is the number of bytes that came.
 */
#define VTPM_WOKEN 0
#define VTPM_INPUT 1
#define VTPM_RESPONSE 2
#define VTPM_FAILED 3
#define VTPM_HEADER_BYTES 10

/* TPM_RC_LOCKOUT; of TPM 2.0 alone, no TPM 1.2 answers so. */
static const unsigned char vtpm_rc_lockout[4] = {0x00, 0x00, 0x09, 0x21};

struct vtpm_turn {
    uint32_t event;
    uint32_t error;                /* the result of libtpms, of VTPM_FAILED */
    uint32_t input_size;           /* of VTPM_INPUT; 0 when the stream has ended or broke */
    uint32_t sent;                 /* bytes of the response that have left, of VTPM_RESPONSE */
    uint32_t has_last;             /* whether a command was run; if not, the next two say nothing */
    unsigned char last_code[4];    /* of the last command */
    unsigned char last_result[4];  /* return code of its response */
    unsigned char input[VTPM_MAX_COMMAND_BYTES + 64];
};

static bool vtpm_is_whole_command(const unsigned char *data, uint32_t size)
{
    if (size < VTPM_HEADER_BYTES || size > VTPM_MAX_COMMAND_BYTES)
        return false;
    return ((uint32_t)data[2] << 24 | (uint32_t)data[3] << 16 | (uint32_t)data[4] << 8 | data[5]) == size;
}

static void vtpm_serve(int link, int wake, struct vtpm_response *response, struct vtpm_turn *turn)
{
    struct pollfd wanted[] = {{.fd = wake, .events = POLLIN}, {.fd = link, .events = POLLIN}};
    bool seen_by_python;
    uint32_t result;
    ssize_t size;

    memset(turn, 0, offsetof(struct vtpm_turn, input));
    for (;;) {
        size = poll(wanted, 2, -1);
        if (size > 0 && wanted[0].revents) {
            turn->event = VTPM_WOKEN;
            return;
        }
        /* Whatever else poll says of the link, recv says what it means. */
        if (size > 0)
            size = recv(link, turn->input, sizeof(turn->input), MSG_DONTWAIT);
        if (size < 0 && (errno == EAGAIN || errno == EINTR))
            continue;
        if (size < 0 || !vtpm_is_whole_command(turn->input, (uint32_t)size)) {
            /* A stream that broke is over, like one that ended: what was done on it before counts all the same. */
            turn->event = VTPM_INPUT;
            turn->input_size = size < 0 ? 0 : (uint32_t)size;
            return;
        }
        turn->has_last = 1;
        memcpy(turn->last_code, turn->input + 6, sizeof(turn->last_code));
        vtpm_state_changed = false;
        result = vtpm_process((char *)turn->input, (uint32_t)size, vtpm_default_locality, response);
        explicit_bzero(turn->input, (size_t)size);
        if (result || response->size < VTPM_HEADER_BYTES) {
            turn->event = VTPM_FAILED;
            turn->error = result;
            return;
        }
        memcpy(turn->last_result, response->data + 6, sizeof(turn->last_result));
        /* A locked TPM is looked at before its client hears that it is one. */
        seen_by_python = vtpm_state_changed || !memcmp(turn->last_result, vtpm_rc_lockout, sizeof(vtpm_rc_lockout));
        size = seen_by_python ? 0 : send(link, response->data, response->size, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (size != (ssize_t)response->size) {
            turn->event = VTPM_RESPONSE;
            turn->sent = size < 0 ? 0 : (uint32_t)size;
            return;
        }
    }
}

static uint32_t vtpm_reset_established(uint32_t locality)
{
    vtpm_locality = locality;
    return TPM_IO_TpmEstablished_Reset();
}

static bool vtpm_has_set_profile(void) { return TPMLIB_SetProfile != NULL; }

static bool vtpm_has_was_manufactured(void) { return TPMLIB_WasManufactured != NULL; }

/*
 * What an instance asks of the kernel that is init of its own virtual machine (instance/vm_boot.py). Here, because the
 * door is loaded anyhow, and ctypes would add to the machine's start. -1 and errno on failure. In a process domain the
 * seccomp filter kills whoever tries one of them.
 */
static int vtpm_mount(const char *kind, const char *place)
{
    return mount(kind, place, kind, MS_NOSUID | MS_NOEXEC, NULL);
}

static int vtpm_load_module(int fd) { return (int)syscall(SYS_finit_module, fd, "", 0); }

static int vtpm_power_off(void) { return reboot(RB_POWER_OFF); }
