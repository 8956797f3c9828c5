/* Xen's three libraries for one process without Xen: the functions that a back-end calls, with their C signatures, over
 * memory. Built by test_xen_libraries.py. `stub_fail` is the errno of the next call that may fail; `stub_conflicts` how
 * many transactions are lost to others. What was called with what is in `stub_log`. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST = 64, TEXT = 256 };

char stub_log[65536];
int stub_fail, stub_conflicts, stub_handles;

static void note(const char *format, ...)
{
    size_t used = strlen(stub_log);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(stub_log + used, sizeof stub_log - used, format, arguments);
    va_end(arguments);
}

static bool fails(void)
{
    if (!stub_fail)
        return false;
    errno = stub_fail;
    stub_fail = 0;
    return true;
}

static void *open_handle(int *handle)
{
    if (fails())
        return NULL;
    stub_handles++;
    return handle;
}

static void check(void *handle, int *expected)
{
    if (handle != expected) {
        fprintf(stderr, "a function was given another handle\n");
        abort();
    }
}

/* -- xenstore.h ---------------------------------------------------------------------------------------------------- */
struct node { char path[TEXT], value[TEXT]; unsigned length; };

static struct node nodes[MOST], before[MOST];
static char events[MOST][2][TEXT];
static int first_event, last_event;
static int xs;

static struct node *find(const char *path)
{
    for (int i = 0; i < MOST; i++)
        if (*nodes[i].path && !strcmp(nodes[i].path, path))
            return &nodes[i];
    return NULL;
}

void stub_put(const char *path, const char *value, unsigned length)
{
    struct node *node = find(path);
    for (int i = 0; !node; i++)
        if (!*nodes[i].path)
            node = &nodes[i];
    strcpy(node->path, path);
    memcpy(node->value, value, length);
    node->length = length;
}

void stub_event(const char *path, const char *token)
{
    strcpy(events[last_event][0], path);
    strcpy(events[last_event++][1], token);
}

void stub_reset(void)
{
    memset(nodes, 0, sizeof nodes);
    first_event = last_event = stub_fail = stub_conflicts = stub_handles = 0;
    *stub_log = 0;
}

void *xs_open(unsigned long flags) { note("xs_open %lu\n", flags); return open_handle(&xs); }
void xs_close(void *handle) { check(handle, &xs); stub_handles--; }
int xs_fileno(void *handle) { check(handle, &xs); return 12345; }

bool xs_watch(void *handle, const char *path, const char *token)
{
    check(handle, &xs);
    note("watch %s %s\n", path, token);
    return !fails();
}

bool xs_unwatch(void *handle, const char *path, const char *token)
{
    check(handle, &xs);
    note("unwatch %s %s\n", path, token);
    return !fails();
}

char **xs_check_watch(void *handle)
{
    check(handle, &xs);
    if (fails())
        return NULL;
    if (first_event == last_event) {
        errno = EAGAIN;
        return NULL;
    }
    char **result = malloc(2 * sizeof *result + 2 * TEXT);
    char *text = (char *)(result + 2);
    for (int i = 0; i < 2; i++, text += TEXT)
        result[i] = strcpy(text, events[first_event][i]);
    first_event++;
    return result;
}

void *xs_read(void *handle, uint32_t transaction, const char *path, unsigned *length)
{
    check(handle, &xs);
    note("read %u %s\n", transaction, path);
    struct node *node = find(path);
    if (fails())
        return NULL;
    if (!node) {
        errno = ENOENT;
        return NULL;
    }
    *length = node->length;
    char *result = malloc(node->length + 1);
    memcpy(result, node->value, node->length);
    result[node->length] = 0;
    return result;
}

char **xs_directory(void *handle, uint32_t transaction, const char *path, unsigned *count)
{
    check(handle, &xs);
    note("directory %u %s\n", transaction, path);
    size_t length = strlen(path);
    if (fails())
        return NULL;
    if (!find(path)) {
        errno = ENOENT;
        return NULL;
    }
    char **result = malloc(MOST * (sizeof *result + TEXT));
    char *text = (char *)(result + MOST);
    *count = 0;
    for (int i = 0; i < MOST; i++)
        if (!strncmp(nodes[i].path, path, length) && nodes[i].path[length] == '/'
            && !strchr(nodes[i].path + length + 1, '/'))
            result[(*count)++] = strcpy(text + i * TEXT, nodes[i].path + length + 1);
    return result;
}

bool xs_write(void *handle, uint32_t transaction, const char *path, const void *data, unsigned length)
{
    check(handle, &xs);
    note("write %u %s %.*s\n", transaction, path, (int)length, (const char *)data);
    if (fails())
        return false;
    stub_put(path, data, length);
    return true;
}

bool xs_rm(void *handle, uint32_t transaction, const char *path)
{
    check(handle, &xs);
    note("rm %u %s\n", transaction, path);
    return !fails();
}

uint32_t xs_transaction_start(void *handle)
{
    check(handle, &xs);
    note("start\n");
    memcpy(before, nodes, sizeof nodes);
    return fails() ? 0 : 0xFFFFFFF7u;
}

bool xs_transaction_end(void *handle, uint32_t transaction, bool abandon)
{
    check(handle, &xs);
    note("end %u %d\n", transaction, abandon);
    if (abandon || stub_conflicts || stub_fail)
        memcpy(nodes, before, sizeof nodes);
    if (fails())
        return false;
    if (!abandon && stub_conflicts) {
        stub_conflicts--;
        errno = EAGAIN;
        return false;
    }
    return true;
}

/* -- xenevtchn.h --------------------------------------------------------------------------------------------------- */
static int xce, event_fd = -1;

void *xenevtchn_open(void *logger, unsigned flags)
{
    note("evtchn_open %d %u\n", logger != NULL, flags);
    event_fd = eventfd(0, EFD_SEMAPHORE | EFD_CLOEXEC);
    return open_handle(&xce);
}

int xenevtchn_close(void *handle) { check(handle, &xce); stub_handles--; return close(event_fd); }
int xenevtchn_fd(void *handle) { check(handle, &xce); return event_fd; }
void stub_send(void) { eventfd_write(event_fd, 1); }

int xenevtchn_bind_interdomain(void *handle, uint32_t domain, uint32_t port)
{
    check(handle, &xce);
    note("bind %u %u\n", domain, port);
    return fails() ? -1 : 77;
}

static int of_port(void *handle, const char *what, uint32_t port)
{
    check(handle, &xce);
    note("%s %u\n", what, port);
    return fails() ? -1 : 0;
}

int xenevtchn_unbind(void *handle, uint32_t port) { return of_port(handle, "unbind", port); }
int xenevtchn_notify(void *handle, uint32_t port) { return of_port(handle, "notify", port); }
int xenevtchn_unmask(void *handle, uint32_t port) { return of_port(handle, "unmask", port); }

int xenevtchn_pending(void *handle)
{
    eventfd_t value;
    check(handle, &xce);
    if (fails() || eventfd_read(event_fd, &value))
        return -1;
    return 77;
}

/* -- xengnttab.h --------------------------------------------------------------------------------------------------- */
static int xgt;
char *stub_page;

void *xengnttab_open(void *logger, unsigned flags)
{
    note("gnttab_open %d %u\n", logger != NULL, flags);
    return open_handle(&xgt);
}

int xengnttab_close(void *handle) { check(handle, &xgt); stub_handles--; return 0; }

/* The page stands between two others, of which a back-end that leaves it would find something. */
void *xengnttab_map_grant_ref(void *handle, uint32_t domain, uint32_t reference, int protection)
{
    check(handle, &xgt);
    note("map %u %u %d\n", domain, reference, protection);
    if (fails())
        return NULL;
    char *place = mmap(NULL, 3 * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return stub_page = place + 4096;
}

int xengnttab_unmap(void *handle, void *address, uint32_t count)
{
    check(handle, &xgt);
    note("unmap %d %u\n", address == stub_page, count);
    return fails() ? -1 : munmap((char *)address - 4096, 3 * 4096);
}
