"""Builds `vtpm.engine._libtpms`, the compiled side of the door to libtpms (cffi API mode).

Run by setuptools at install time, or by hand to build in place; imported by nothing at run time. `door.c`
holds what must not cost a Python call per TPM command (the hot path, locality, physical presence) and what
Python must not lend out (the command's memory: libtpms decrypts parameters in place). It compiles against
libtpms 0.9 and later; symbols of later versions are weak and may be NULL.
"""

from __future__ import annotations

from pathlib import Path

from cffi import FFI

_DECLARATIONS = """
    #define VTPM_MAX_COMMAND_BYTES ...
    #define TPM_LIBRARY_VERSION ...

    #define VTPM_WOKEN ...
    #define VTPM_INPUT ...
    #define VTPM_RESPONSE ...
    #define VTPM_FAILED ...

    struct vtpm_response { unsigned char *data; uint32_t size; uint32_t capacity; };
    struct vtpm_turn {
        uint32_t event, error, input_size, sent, has_last;
        unsigned char last_code[4], last_result[4];
        unsigned char input[...];
        ...;
    };

    void vtpm_register(void);
    uint32_t vtpm_process(const char *command, uint32_t size, uint32_t locality,
                          struct vtpm_response *response);
    void vtpm_set_default_locality(uint32_t locality);
    void vtpm_serve(int link, int wake, struct vtpm_response *response, struct vtpm_turn *turn);
    uint32_t vtpm_reset_established(uint32_t locality);
    bool vtpm_has_set_profile(void);
    bool vtpm_has_was_manufactured(void);
    int vtpm_mount(const char *kind, const char *place);
    int vtpm_load_module(int fd);
    int vtpm_power_off(void);
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

_SOURCE = Path(__file__).with_name("door.c").read_text()

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
