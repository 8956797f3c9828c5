"""Builds `vtpm.engine._libtpms`, the compiled side of the door to libtpms (cffi API mode).

Run by setuptools at install time, or by hand to build in place; imported by nothing at run time. The C below
holds what must not cost a Python call per TPM command (locality, physical presence) and what Python must not
lend out (the command's memory: libtpms decrypts parameters in place). It compiles against libtpms 0.9 and
later; symbols of later versions are weak and may be NULL.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_DECLARATIONS = """
    #define VTPM_MAX_COMMAND_BYTES ...
    #define TPM_LIBRARY_VERSION ...

    struct vtpm_response { unsigned char *data; uint32_t size; uint32_t capacity; };

    void vtpm_register(void);
    uint32_t vtpm_process(const char *command, uint32_t size, uint32_t locality,
                          struct vtpm_response *response);
    uint32_t vtpm_reset_established(uint32_t locality);
    bool vtpm_has_set_profile(void);
    bool vtpm_has_was_manufactured(void);
    void *malloc(size_t);
    void free(void *);

    extern "Python" uint32_t vtpm_load(unsigned char **data, uint32_t *length, const char *name);
    extern "Python" uint32_t vtpm_store(const unsigned char *data, uint32_t length, const char *name);
    extern "Python" uint32_t vtpm_delete(const char *name, bool must_exist);

    uint32_t TPMLIB_GetVersion(void);
    uint32_t TPMLIB_ChooseTPMVersion(int version);
    uint32_t TPMLIB_MainInit(void);
    void TPMLIB_Terminate(void);
    uint32_t TPMLIB_CancelCommand(void);
    uint32_t TPMLIB_SetBufferSize(uint32_t wanted, uint32_t *min, uint32_t *max);
    uint32_t TPMLIB_SetState(int kind, const unsigned char *blob, uint32_t size);
    uint32_t TPMLIB_GetState(int kind, unsigned char **blob, uint32_t *size);
    char *TPMLIB_GetInfo(int flags);
    uint32_t TPM_IO_Hash_Start(void);
    uint32_t TPM_IO_Hash_Data(const unsigned char *data, uint32_t size);
    uint32_t TPM_IO_Hash_End(void);
    uint32_t TPM_IO_TpmEstablished_Get(unsigned char *established);
"""

_SOURCE = r"""
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
"""

ffibuilder = FFI()
ffibuilder.cdef(_DECLARATIONS)
ffibuilder.set_source(
    "vtpm.engine._libtpms",
    _SOURCE,
    libraries=["tpms"],
    extra_compile_args=["-O2", "-Wall", "-Werror=implicit-function-declaration"],
)

if __name__ == "__main__":
    # In place, for a checkout that is used without being installed: python src/vtpm/engine/_build.py
    ffibuilder.compile(tmpdir=str(Path(__file__).resolve().parents[2]))
