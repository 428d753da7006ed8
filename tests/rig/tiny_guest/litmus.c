/* Writes rising numbers, each to disk A and, when it is durable there, to disk B. At every instant the last number on A is the
 * last on B or one more. Each slot is a process with a ring of blocks of its own on both disks. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BLOCK = 4096, RING = 64 };
static const char MAGIC[8] = "rigslot";

static int slot(int a, int b, unsigned number)
{
    uint64_t *block;
    if (posix_memalign((void **)&block, BLOCK, BLOCK))
        return 1;
    for (uint64_t n = 1;; n++) {
        memcpy(block, MAGIC, sizeof MAGIC);
        block[1] = number;
        for (unsigned i = 2; i < BLOCK / 8; i++)
            block[i] = n;
        off_t at = ((off_t)number * RING + n % RING) * BLOCK;
        if (pwrite(a, block, BLOCK, at) != BLOCK || fdatasync(a) || pwrite(b, block, BLOCK, at) != BLOCK || fdatasync(b)) {
            printf("rig: litmus slot %u: write %llu: %s\n", number, (unsigned long long)n, strerror(errno));
            return 1;
        }
        if (n % 256 == 0)
            printf("rig: litmus slot %u at %llu\n", number, (unsigned long long)n);
    }
}

int main(int argc, char **argv)
{
    if (argc != 4)
        return 2;
    int a = open(argv[1], O_RDWR | O_DIRECT), b = open(argv[2], O_RDWR | O_DIRECT);
    if (a < 0 || b < 0) {
        printf("rig: litmus: %s\n", strerror(errno));
        return 1;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    int slots = atoi(argv[3]);
    for (int i = 0; i < slots; i++)
        if (fork() == 0)
            _exit(slot(a, b, i));
    while (wait(NULL) > 0 || errno == EINTR)
        ;
    return 0;
}
