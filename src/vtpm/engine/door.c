/* The compiled side of the door to libtpms; _build.py says why it is C and declares what Python sees of it. */
#include <limits.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

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
    return vtpm_store(data, length, name);
}

static TPM_RESULT vtpm_delete_name(uint32_t tpm_number, const char *name, TPM_BOOL must_exist)
{
    (void)tpm_number;
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

static uint32_t vtpm_reset_established(uint32_t locality)
{
    vtpm_locality = locality;
    return TPM_IO_TpmEstablished_Reset();
}

static bool vtpm_has_set_profile(void) { return TPMLIB_SetProfile != NULL; }

static bool vtpm_has_was_manufactured(void) { return TPMLIB_WasManufactured != NULL; }
