// The split plan: which parts of which requests every slot of the decode kernel works through. The rule and the layout
// are those of `plan` in src/flash_mla/backends/torch.py, integer for integer.
//
// plan_splits is one block, because the walk through the requests is serial:
//   unit counts to shared memory -> 32 lanes walk with 32 capacities of a slot -> one thread walks with the smallest
//   that suffices and notes where each request begins -> all threads turn the notes into rows.
// A walk takes one step per request, however many slots that request fills; both walks together are the time.
// plan_fixed is the deterministic plan: every request by its own length, a thread per row.

constexpr int THREADS = 1024;
constexpr int WARP = 32;
constexpr int PLAN_BLOCK = 64;       // tokens in a unit
constexpr int PLAN_WHOLE = 1 << 30;  // the cut point behind the last unit: fractions of a request in 2^-30
constexpr int PLAN_CANDIDATES = 32;  // capacities that are tried, from an even share of the work on
constexpr int MIN_TAKE = 1;          // units in the smallest piece that a request is cut for
constexpr int MAX_PARTS = 8;         // of a request in a deterministic plan
constexpr int FIXED_UNITS = 32;      // units per part in a deterministic plan, up to MAX_PARTS
constexpr int CHUNK = 8192;          // requests whose unit counts are in shared memory at a time: 32 KiB
static_assert(PLAN_CANDIDATES == WARP, "a lane per candidate");

// One argument of both kernels; src/flash_mla/backends/cuda/plan.py packs it.
struct PlanParams {
  const int* cache_seqlens;  // [batch], tokens
  int4* items;               // [num_slots + batch]: request, begin, end, next
  int2* splits;              // [batch]: slot of part 0, number of parts
  long long seqlens_stride;  // elements
  int batch;
  int num_slots;
  int item_cost;  // units that an item costs beyond its own
  int cut_cost;   // units that a piece of a cut request costs on top
};
static_assert(sizeof(PlanParams) == 48, "as packed by plan.py");

// What one step of the walk decides for a request.
struct Placed {
  int slot;  // of its first part
  int num_parts;
  int taken;  // units of its first part
};

// Int: long long only where a slot takes 2^30 units or more; 64 bits cost two instructions each.
template <typename Int>
struct Walk {
  Int capacity;  // units
  Int room;      // units left in `slot`
  int slot;
};

__device__ int units_of(const PlanParams& params, int request) {
  const int length = params.cache_seqlens[request * params.seqlens_stride];
  return length > 0 ? (length - 1) / PLAN_BLOCK + 1 : 0;  // length + 63 overflows from 2^31 - 63 on
}

// b of d units as a fraction: rounded up, so that d * fraction >> 30 is b again.
__device__ int cut_point(long long units_before, int units) {
  const unsigned long long scaled = (static_cast<unsigned long long>(units_before) << 30) + (units - 1);
  return static_cast<int>(scaled / static_cast<unsigned>(units));
}

template <typename Int>
__device__ Placed place(Walk<Int>& walk, int units, const PlanParams& params) {
  const int piece_cost = params.item_cost + params.cut_cost;
  const int whole = units + params.item_cost;
  if (whole > walk.room && walk.room < piece_cost + MIN_TAKE) {
    walk.slot += 1;
    walk.room = walk.capacity;
  }
  Placed placed = {walk.slot, 1, units};
  if (whole <= walk.room) {
    walk.room -= whole;
    return placed;
  }
  // What is left over begins slots of its own, each taking as much as it can: no step per slot is needed.
  const Int most = walk.capacity - piece_cost;
  placed.taken = static_cast<int>(walk.room - piece_cost);
  const int left = units - placed.taken;
  const int more = left <= most ? 1 : static_cast<int>((left + most - 1) / most);
  walk.slot += more;
  walk.room = more * most - left;
  placed.num_parts = 1 + more;
  return placed;
}

__device__ void load_units(const PlanParams& params, int begin, int* units) {
  __syncthreads();  // the chunk before may still be read
  const int count = min(CHUNK, params.batch - begin);
  for (int i = threadIdx.x; i < count; i += THREADS) units[i] = units_of(params, begin + i);
  __syncthreads();
}

// Smallest capacity worth trying. All threads call it; the result is right on warp 0. Leaves the only chunk loaded.
__device__ long long lowest_capacity(const PlanParams& params, int* units) {
  long long total = static_cast<long long>(params.item_cost) * params.batch;
  long long sum = 0;
  for (int begin = 0; begin < params.batch; begin += CHUNK) {
    load_units(params, begin, units);
    const int count = min(CHUNK, params.batch - begin);
    if (threadIdx.x < WARP) {
      for (int i = threadIdx.x; i < count; i += WARP) sum += units[i];
    }
  }
  if (threadIdx.x < WARP) {
    for (int distance = WARP / 2; distance > 0; distance /= 2) sum += __shfl_xor_sync(0xffffffff, sum, distance);
  }
  total += sum;
  const long long even_share = (total + params.num_slots - 1) / params.num_slots;
  return max(even_share, static_cast<long long>(params.item_cost + params.cut_cost + MIN_TAKE));
}

// Walks through all requests on the first `lanes` threads; with NOTE it leaves `splits` and, in column 2 of row
// num_slots + request, the units of the first part. Returns whether the slots sufficed.
template <typename Int, bool NOTE>
__device__ bool walk_all(const PlanParams& params, int* units, Int capacity, int lanes) {
  Walk<Int> walk = {capacity, capacity, 0};
  for (int begin = 0; begin < params.batch; begin += CHUNK) {
    if (params.batch > CHUNK) load_units(params, begin, units);
    if (threadIdx.x >= lanes) continue;
    const int count = min(CHUNK, params.batch - begin);
    int next = units[0];
    for (int i = 0; i < count; ++i) {
      const int now = next;
      next = units[min(i + 1, count - 1)];  // ahead of its use: the walk does not wait for shared memory
      const Placed placed = place(walk, now, params);
      if (NOTE) {
        params.splits[begin + i] = make_int2(placed.slot, placed.num_parts);
        params.items[params.num_slots + begin + i].z = placed.taken;
      }
    }
  }
  return walk.slot < params.num_slots;
}

// The capacity that the plan uses, after both walks; all threads call it, and the result is right on thread 0.
template <typename Int>
__device__ Int choose_and_note(const PlanParams& params, int* units, Int lowest, Int* shared_capacity) {
  const Int candidate = lowest + threadIdx.x % WARP;
  const bool suffices = walk_all<Int, false>(params, units, candidate, WARP);
  if (threadIdx.x < WARP) {
    // The last candidates always suffice (contract.py, PLAN_CANDIDATES), so the mask is never empty.
    const unsigned mask = __ballot_sync(0xffffffff, suffices);
    if (threadIdx.x == 0) *shared_capacity = lowest + (__ffs(mask) - 1);
  }
  __syncthreads();
  const Int capacity = *shared_capacity;
  walk_all<Int, true>(params, units, capacity, 1);
  __syncthreads();
  return capacity;
}

// First items of slots that go on with a request; all other slots' rows are marked unused for now.
__device__ void write_later_parts(const PlanParams& params, long long most) {
  for (int slot = threadIdx.x; slot < params.num_slots; slot += THREADS) {
    int4 row = make_int4(-1, 0, 0, -1);
    // The last request that begins in a slot before this one: slots of first parts ascend.
    int below = 0, above = params.batch;
    while (below < above) {
      const int middle = (below + above) / 2;
      if (params.splits[middle].x < slot) {
        below = middle + 1;
      } else {
        above = middle;
      }
    }
    const int request = below - 1;
    const int2 split = request >= 0 ? params.splits[request] : make_int2(0, 0);
    const int part = slot - split.x;
    if (request >= 0 && part < split.y) {
      const int units = units_of(params, request);
      const bool is_last = part + 1 == split.y;
      const long long begin = params.items[params.num_slots + request].z + (part - 1) * most;
      const bool goes_on = request + 1 < params.batch && params.splits[request + 1].x == slot;
      row.x = request;
      row.y = cut_point(begin, units);
      row.z = is_last ? PLAN_WHOLE : cut_point(begin + most, units);
      row.w = goes_on ? params.num_slots + request + 1 : -1;
    }
    params.items[slot] = row;
  }
}

__device__ void write_first_parts(const PlanParams& params) {
  for (int request = threadIdx.x; request < params.batch; request += THREADS) {
    const int2 split = params.splits[request];
    const int2 before = request > 0 ? params.splits[request - 1] : make_int2(-1, 1);
    const bool is_first = split.x > before.x + before.y - 1;
    const bool goes_on = request + 1 < params.batch && params.splits[request + 1].x == split.x;
    const int taken = params.items[params.num_slots + request].z;
    int4 row;
    row.x = request;
    row.y = 0;
    row.z = split.y == 1 ? PLAN_WHOLE : cut_point(taken, units_of(params, request));
    row.w = goes_on ? params.num_slots + request + 1 : -1;
    if (is_first) params.items[split.x] = row;
    params.items[params.num_slots + request] = is_first ? make_int4(-1, 0, 0, -1) : row;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS) plan_splits(const PlanParams params) {
  __shared__ int units[CHUNK];
  __shared__ long long shared_lowest, shared_capacity;
  __shared__ int shared_capacity_32;
  const long long lowest = lowest_capacity(params, units);
  if (threadIdx.x == 0) shared_lowest = lowest;
  __syncthreads();
  long long capacity;
  if (shared_lowest < PLAN_WHOLE) {
    capacity = choose_and_note<int>(params, units, static_cast<int>(shared_lowest), &shared_capacity_32);
  } else {
    capacity = choose_and_note<long long>(params, units, shared_lowest, &shared_capacity);
  }
  write_later_parts(params, capacity - params.item_cost - params.cut_cost);
  __syncthreads();  // it reads what was noted in the rows that are written next
  write_first_parts(params);
}

extern "C" __global__ void __launch_bounds__(THREADS) plan_fixed(const PlanParams params) {
  const long long index = static_cast<long long>(blockIdx.x) * THREADS + threadIdx.x;
  if (index >= static_cast<long long>(params.num_slots) + params.batch) return;
  int4 row = make_int4(-1, 0, 0, -1);
  const int request = static_cast<int>(index / MAX_PARTS), part = static_cast<int>(index % MAX_PARTS);
  if (request < params.batch) {
    const int units = units_of(params, request);
    const int num_parts = min(MAX_PARTS, max(1, (units + FIXED_UNITS - 1) / FIXED_UNITS));
    if (part < num_parts) {
      // units * part reaches 2^28; a request without units is one part, whose cut points need none.
      row.x = request;
      row.y = part == 0 ? 0 : cut_point(units * part / num_parts, units);
      row.z = part + 1 == num_parts ? PLAN_WHOLE : cut_point(units * (part + 1) / num_parts, units);
    }
    if (part == 0) params.splits[request] = make_int2(request * MAX_PARTS, num_parts);
  }
  params.items[index] = row;
}
