-- PULL and CLAIM. ARGV: worker, free slots, lease_ms, 1 to reap, poison limit, lanes in the order to serve.
-- Takes entries whose lease is over, then new ones, and claims each under the next fence. Returns
-- {claims, tails}: a claim is {rid, attempt, api, payload, emitted tokens, ms to its deadline}; tails (only when
-- there is no claim) are the newest ids of the lanes, for a reader that waits for more.
local worker, free = ARGV[1], tonumber(ARGV[2])
local now, claims = now_ms(), {}

local function poison(rid, h)
  redis.call('XADD', PREFIX .. 'dlq', 'MAXLEN', '~', DLQ_LENGTH, '*', 'rid', rid, 'tenant', h[9],
    'why', 'poisoned', 'attempts', h[3], 'payload_sha1', redis.sha1hex(h[8]))
  terminate(rid, 'error', 'poisoned')
end

local function claim(lane, eid, rid)
  local h = redis.call('HMGET', req_key(rid), 'state', 'eid', 'attempt', 'api', 'cancel', 'deadline_ms',
    'start_by_ms', 'payload', 'tenant', 'lastlen', 'noprog')
  if not h[1] or h[1] == 'done' or h[2] ~= eid then return drop(lane, eid) end
  local finish, err = verdict(h[5], h[4], h[6], now)
  if not finish and h[3] == '0' and now > tonumber(h[7]) then finish, err = 'error', 'queue_timeout' end
  if finish then return terminate(rid, finish, err) end

  -- deliveries without a new token since the last one are what makes a request suspect, not deliveries
  local length, noprog = redis.call('LLEN', tok_key(rid)), 0
  if length <= tonumber(h[10]) then noprog = tonumber(h[11] or 0) + 1 end
  redis.call('HSET', req_key(rid), 'lastlen', length, 'noprog', noprog)
  if noprog >= tonumber(ARGV[5]) then return poison(rid, h) end

  local attempt = h[3] + 1
  redis.call('HSET', req_key(rid), 'attempt', attempt, 'state', 'running', 'worker', worker)
  claims[#claims + 1] = {rid, attempt, h[4], h[8], redis.call('LRANGE', tok_key(rid), 0, -1), h[6] - now}
end

local function claim_all(lane, entries)
  for _, entry in ipairs(entries) do
    -- an entry deleted while it was pending has no fields
    if entry and entry[2] then claim(lane, entry[1], entry[2][2]) end
  end
end

local function reap(lane)
  local cursor = '0-0'
  repeat
    local found = redis.call('XAUTOCLAIM', lane_key(lane), GROUP, worker, ARGV[3], cursor, 'COUNT', free - #claims)
    cursor = found[1]
    claim_all(lane, found[2])
  until cursor == '0-0' or #claims >= free
end

local function pull(lane)
  while #claims < free do
    local found = redis.call('XREADGROUP', 'GROUP', GROUP, worker, 'COUNT', free - #claims,
      'STREAMS', lane_key(lane), '>')
    if not found then return end
    claim_all(lane, found[1][2])
  end
end

for i = 6, #ARGV do ensure_lane(ARGV[i]) end
if ARGV[4] == '1' then
  for i = 6, #ARGV do if #claims < free then reap(ARGV[i]) end end
end
for i = 6, #ARGV do pull(ARGV[i]) end

local tails = {}
if #claims == 0 then
  for i = 6, #ARGV do
    local about = redis.call('XINFO', 'STREAM', lane_key(ARGV[i]))
    for k = 1, #about, 2 do
      if about[k] == 'last-generated-id' then tails[#tails + 1] = about[k + 1] end
    end
  end
end
return {claims, tails}
