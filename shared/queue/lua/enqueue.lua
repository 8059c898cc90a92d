-- ENQ. ARGV: rid, api, lane, mode, max_depth, deadline_ms, wait_ms, api_ttl_ms, tenant, known tokens (JSON),
-- payload. Idempotent by rid: `new` leaves a request that is in its lane alone. `force` puts an entry that was
-- lost back. `restart` also reopens an ended request: its log is replaced by the tokens the owner has, and the
-- fence moves on, so that no worker goes on from the old one.
-- Returns {'ok' | 'done' | 'full', attempt}.
local rid, api, lane, mode = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local known = cjson.decode(ARGV[10])
local r, log, now = req_key(rid), tok_key(rid), now_ms()
redis.call('SET', api_key(api), 1, 'PX', ARGV[8])

local h = redis.call('HMGET', r, 'state', 'eid', 'lane', 'attempt')
local attempt = tonumber(h[4] or 0)
if h[1] then
  if h[1] == 'done' and mode ~= 'restart' then return {'done', attempt} end
  if mode == 'new' and #redis.call('XRANGE', lane_key(h[3]), h[2], h[2]) > 0 then return {'ok', attempt} end
  drop(h[3], h[2])
  lane = h[3]
end
ensure_lane(lane)
if mode == 'new' and redis.call('XLEN', lane_key(lane)) >= tonumber(ARGV[5]) then return {'full', attempt} end

if mode == 'restart' then attempt = attempt + 1 end
if mode == 'restart' or redis.call('LLEN', log) < #known then
  redis.call('DEL', log, logprob_key(rid))
  push_all(log, known)
end
local eid = redis.call('XADD', lane_key(lane), '*', 'rid', rid)
redis.call('HSET', r, 'state', 'queued', 'eid', eid, 'lane', lane, 'api', api, 'tenant', ARGV[9],
  'payload', ARGV[11], 'attempt', attempt, 'worker', '', 'lastlen', -1)
redis.call('HDEL', r, 'finish', 'error')
redis.call('HSETNX', r, 'deadline_ms', now + ARGV[6])
redis.call('HSETNX', r, 'start_by_ms', now + ARGV[7])
redis.call('EXPIRE', r, live_ttl_s(ARGV[6]))
expire_logs(rid, live_ttl_s(ARGV[6]))
return {'ok', attempt}
